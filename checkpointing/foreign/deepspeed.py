"""DeepSpeed's checkpoints of ZeRO stages 1 to 3: every rank's flat partitions of fp32 masters and their moments.

Stages 1 and 2 lay a group's parameters one after the other and give each rank an equal range of them all; stage 3 gives
each rank an equal range of every parameter. What lies where follows from the parameters' shapes, in the order in which
the checkpoint has them. Frozen parameters and buffers lie beside that. DeepSpeed is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpointing.errors import DamagedError, MismatchError, NotFoundError, first_few
from checkpointing.foreign.archive import Mapped, read_archive
from checkpointing.foreign.state import Foreign, bare, under_all_names
from checkpointing.geometry import Piece, Shape
from checkpointing.small_files import read_text

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<model>\d+)_optim_states\.pt$")
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<model>\d+)_model_states\.pt$")
_EXPERTS = re.compile(r"expert|^expp_rank")
_NOT_PARAMETERS = ("lr_scheduler", "data_sampler", "random_ltd", "loss_scaler")


def newest_tag(directory: Path) -> Path | None:
    """The directory of the checkpoint that DIR means: itself, or the one that its file `latest` names."""
    if any(_MODEL.fullmatch(path.name) for path in directory.glob("*.pt")):
        return directory
    latest = directory / "latest"
    if latest.is_file():
        try:
            tag = directory / read_text(latest).strip()
        except ValueError as error:
            raise DamagedError(f"{latest} is no text: {error}") from error
        if tag.parent == directory and tag.is_dir():
            return tag
        raise NotFoundError(f"{latest} names {tag.name}, which is not there. Give the directory of one checkpoint.")
    return None


def describe_deepspeed(directory: Path) -> Foreign:
    """Describe a checkpoint of all ranks. `MismatchError` for model parallelism, whose cuts it does not say."""
    if experts := sorted(path.name for path in directory.glob("*.pt") if _EXPERTS.search(path.name)):
        raise MismatchError(
            f"{directory} holds experts that DeepSpeed shared out over processes ({first_few(experts, 2)}), which is "
            "not read here. Save the model whole first, as with zero_to_fp32, and import that."
        )
    files = {_OPTIMIZER: dict[int, Path](), _MODEL: dict[int, Path]()}
    for path in sorted(directory.glob("*.pt")):
        for pattern, found in files.items():
            if match := pattern.fullmatch(path.name):
                if int(match["model"]):
                    raise MismatchError(
                        f"{directory} was saved under tensor or pipeline parallelism of DeepSpeed, which does not say "
                        "how it cut its parameters. Convert it with DeepSpeed's ds_to_universal first."
                    )
                found[int(match["rank"] or 0)] = path
    models = {rank: _read(path) for rank, path in files[_MODEL].items()}
    if 0 not in models:
        raise NotFoundError(f"{directory} lacks the model states of rank 0")
    first = models[0]
    optimizers = [_optimizer(path) for _, path in sorted(files[_OPTIMIZER].items())]
    if optimizers:
        ranks = int(_partitions(optimizers[0]))
        if sorted(files[_OPTIMIZER]) != list(range(ranks)):
            missing = sorted(set(range(ranks)) - set(files[_OPTIMIZER]))
            raise NotFoundError(f"{directory} lacks the optimizer states of ranks {missing} of {ranks}")
    # Every rank has the step of what it holds a part of.
    pieces = list({(piece.name, piece.box): piece for piece in _trained(first, optimizers)}.values())
    trained = {piece.name for piece in pieces}
    # The module's state has these too, in the few bits that it computes with.
    tied = {str(other): str(stored) for other, stored in (first.get("shared_params") or {}).items()}
    held = trained | {f"model/{name}" for name in tied}
    pieces += [piece for piece in _untrained(models) if piece.name not in held]
    names = [piece.name.partition("/")[2] for piece in pieces if piece.name.startswith("model/")]
    renamed = [_renamed(piece, names) for piece in under_all_names(pieces, tied)]
    stage = _stage(optimizers[0]) if optimizers else 0
    left_out = [key for key in _NOT_PARAMETERS if first.get(key)]
    if not optimizers and first.get("optimizer"):
        left_out.append("optimizer, which numbers its parameters")
    kind = f"DeepSpeed ZeRO stage {stage}, {max(1, len(optimizers))} rank{'s' * (len(optimizers) > 1)}"
    steps = first.get("global_steps")
    return Foreign(kind, None if steps is None else int(steps), renamed, left_out)


def _renamed(piece: Piece, names: Sequence[str]) -> Piece:
    group, _, rest = piece.name.partition("/")
    name, slash, key = rest.partition("/")
    return Piece(f"{group}/{bare(name, names)}{slash}{key}", piece.tensor, piece.offset, piece.global_shape)


def _read(path: Path) -> dict[str, Any]:
    read = read_archive(Mapped.of(path))
    if not isinstance(read, dict):
        raise DamagedError(f"{path} is no checkpoint of DeepSpeed")
    return read


def _optimizer(path: Path) -> dict[str, Any]:
    state = _read(path).get("optimizer_state_dict")
    if not isinstance(state, dict) or "partition_count" not in state:
        raise DamagedError(f"{path} holds no partitions of an optimizer of ZeRO")
    return state


def _partitions(state: Mapping[str, Any]) -> int:
    counts = state["partition_count"]  # one for each group, or one for all
    every = {int(count) for count in (counts if isinstance(counts, list | tuple) else [counts])}
    if len(every) != 1:
        raise MismatchError(
            f"Groups of parameters are shared by {sorted(every)} ranks each, as experts are: not read here."
        )
    return every.pop()


def _stage(state: Mapping[str, Any]) -> int:
    if "fp32_flat_groups" in state:
        return 3
    stage = getattr(state.get("zero_stage"), "arguments", (1,))  # an enumeration; DeepSpeed's own of bf16 has none
    return int(stage[0]) if stage and isinstance(stage[0], int) else 1


def _trained(model: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
    groups = [{str(name): tuple(shape) for name, shape in group.items()} for group in model.get("param_shapes") or ()]
    for rank, state in enumerate(ranks):
        if "fp32_flat_groups" in state:
            yield from _of_each(groups, state, rank, len(ranks))
        else:
            yield from _of_all(groups, state, rank, _sizes(ranks, len(groups)))


def _sizes(ranks: Sequence[Mapping[str, Any]], groups: int) -> list[int]:
    """How long a rank's partition of each group is. Masters are saved without padding, their moments with it."""
    return [
        max(
            int(value.numel())
            for state in ranks
            for value in (state["single_partition_of_fp32_groups"][group], *_moments(state, group).values())
            if isinstance(value, torch.Tensor)
        )
        for group in range(groups)
    ]


def _moments(state: Mapping[str, Any], group: int) -> dict[str, Any]:
    """The moments of a flat partition. The optimizer numbers them in their order."""
    base = state.get("base_optimizer_state", state.get("optimizer_state_dict")) or {}
    if not isinstance(base, dict):
        raise MismatchError(
            "This checkpoint was saved with zero_elastic_checkpoint, whose moments lack their padding. Save it without."
        )
    return dict(base.get("state", {}).get(group, {}))


def _of_all(
    groups: Sequence[Mapping[str, Shape]], state: Mapping[str, Any], rank: int, sizes: Sequence[int]
) -> Iterator[Piece]:
    paddings = state.get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
    for number, shapes in enumerate(groups):
        master = state["single_partition_of_fp32_groups"][number]
        left, right = rank * sizes[number], (rank + 1) * sizes[number]
        lengths = [prod(shape) + padding for shape, padding in zip(shapes.values(), paddings[number], strict=True)]
        for (name, shape), offset in zip(shapes.items(), accumulate(lengths, initial=0), strict=False):
            start, stop = max(offset, left), min(offset + prod(shape), right)
            yield from _states(
                name, shape, master, _moments(state, number), start - left, max(0, stop - start), start - offset
            )


def _of_each(groups: Sequence[Mapping[str, Shape]], state: Mapping[str, Any], rank: int, size: int) -> Iterator[Piece]:
    """A group here is one of the partitions that stage 3 steps one after the other; shapes may have fewer or more."""
    flats = state["fp32_flat_groups"]
    shapes = [(name, shape) for group in groups for name, shape in group.items()]
    for number, flat in enumerate(flats):
        position, moments = 0, _moments(state, number)
        while shapes and position < flat.numel():
            name, shape = shapes.pop(0)
            length = -(-prod(shape) // size)
            yield from _states(name, shape, flat, moments, position, length, rank * length)
            position += length
    if shapes:
        raise DamagedError(f"the partitions of rank {rank} end before {shapes[0][0]}")


def _states(
    name: str, shape: Shape, master: torch.Tensor, moments: Mapping[str, Any], at: int, length: int, start: int
) -> Iterator[Piece]:
    """`length` elements of a parameter from `start`, which lie at `at` in the flat partition and in its moments."""
    length = min(length, prod(shape) - start)  # without padding
    if length <= 0:
        return
    if at + length > master.numel():
        raise DamagedError(f"the partition of {name} has {master.numel()} elements, and {at + length} are counted on")
    yield from Piece.flat(f"model/{name}", master.reshape(-1)[at : at + length], start, shape)
    for key, value in moments.items():
        if isinstance(value, int | float):
            value = torch.tensor(float(value))
        if isinstance(value, torch.Tensor) and value.dim() == 0:
            yield Piece(f"optim/{name}/{key}", value, (), ())
        elif isinstance(value, torch.Tensor):
            yield from Piece.flat(f"optim/{name}/{key}", value.reshape(-1)[at : at + length], start, shape)


def _untrained(models: Mapping[int, Mapping[str, Any]]) -> Iterator[Piece]:
    """Buffers, and parameters without a master: whole in the module's state, or under stage 3 in fragments."""
    first = models[0]
    shapes = first.get("frozen_param_shapes") or {}
    for rank, model in sorted(models.items()):
        for name, fragment in (model.get("frozen_param_fragments") or {}).items():
            shape, flat = tuple(shapes[name]), fragment.reshape(-1)
            if flat.numel() == prod(shape) and tuple(fragment.shape) == shape:
                yield Piece(f"model/{name}", fragment, (0,) * len(shape), shape)
            else:
                yield from Piece.flat(f"model/{name}", flat, rank * flat.numel(), shape)
    buffers = {str(name) for name in first.get("buffer_names") or ()}
    fragments = {str(name) for name in shapes}
    module = first.get("module")
    for name, tensor in (module if isinstance(module, dict) else {}).items():
        whole = isinstance(tensor, torch.Tensor) and (tensor.numel() or name in buffers)
        if whole and str(name) not in fragments:
            group = "buffer" if name in buffers else "model"
            yield Piece(f"{group}/{name}", tensor, (0,) * tensor.dim(), tuple(tensor.shape))
