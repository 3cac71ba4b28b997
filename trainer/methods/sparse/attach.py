"""Which layers of a model are sparse, and the first selection, while every rank holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from checkpointing import Manifest
from checkpointing.errors import first_few
from trainer.elastic.randomness import reseed
from trainer.errors import Refused
from trainer.methods.method import Sizes
from trainer.methods.selection.choosing import Ranks, choose_above, choose_each, choose_together
from trainer.methods.selection.scores import Subject, scores_of, selection_key
from trainer.methods.sparse.budgets import Target, counts_of, dense_hits, together
from trainer.methods.sparse.layer import INDICES, SparseLayer, choose, make_sparse, undo_sparse
from trainer.methods.sparse.promoted import make_promoted
from trainer.methods.targets import targeted
from trainer.models.families import FAMILIES, KV, Q
from trainer.options.method import Allocator, Granularity, Sparse

PROMOTED = -1  # a size: the layer has a low-rank pair instead


def attach(model: nn.Module, config: Sparse, seed: int, sizes: Sizes | None = None) -> nn.Module:
    """Freeze a model, and make the targeted layers sparse: of these sizes, or as many as they get on average.

    Their entries are the first ones until others are chosen.
    """
    found = targets_of(model, config)
    if sizes is None:
        counts = counts_of(config, {name: target for name, (_, target) in found.items()})
        sizes = {name: count * found[name][1].width for name, count in counts.items()}
    if strangers := sorted(sizes.keys() - found.keys()):
        raise Refused(f"method.target_modules does not hold {first_few(strangers)}, which the checkpoint trains.")
    model.requires_grad_(False)
    for name, (layer, _) in found.items():
        if config.bf16_weights:
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
        _make(layer, name, config, seed, sizes.get(name, 0))
    return model


def _make(layer: nn.Module, name: str, config: Sparse, seed: int, count: int) -> None:
    if count == PROMOTED:
        reseed(seed, "method", name)
        make_promoted(layer, config.promote_rank)
    elif count:
        make_sparse(layer, config.granularity, count)


def settle(model: nn.Module, config: Sparse, seed: int, selection: Mapping[str, torch.Tensor]) -> None:
    """Train these entries of an attached model whose weights are the base."""
    targets = targets_of(model, config)
    counts = {name: indices.numel() for name, indices in selection.items()}
    hit = {name: target for name, (_, target) in targets.items() if name in selection}
    promoted = dense_hits(counts, hit, config.promote_rank, config.promote_alpha)
    for name, (layer, _) in targets.items():
        if name not in selection or name in promoted:
            undo_sparse(layer)
            if name in promoted:
                _make(layer, name, config, seed, PROMOTED)
        else:
            if not isinstance(layer, SparseLayer):
                make_sparse(layer, config.granularity, counts[name])
            choose(layer, selection[name])  # type: ignore[arg-type]


def train_whole(model: nn.Module, config: Sparse) -> None:
    """Train the targeted weights of an attached model as they are; nothing is sparse."""
    for layer, _ in targets_of(model, config).values():
        undo_sparse(layer)
        layer.weight.requires_grad_(True)


def sizes_in(manifest: Manifest) -> dict[str, int]:
    """Sizes of a checkpoint's layers, in columns or rows rather than heads; empty where none is sparse."""
    found: dict[str, int] = {}
    for name, tensor in manifest.tensors.items():
        layer, _, last = name.rpartition(".")
        if name.startswith("buffer/") and last == INDICES:
            found[layer.removeprefix("buffer/")] = tensor.shape[0]
        elif name.startswith("model/") and name.endswith(".lora_A.weight"):
            found[name.removeprefix("model/").removesuffix(".lora_A.weight")] = PROMOTED
    return found


def targets_of(model: nn.Module, config: Sparse) -> dict[str, tuple[nn.Module, Target]]:
    """The layers that are to be sparse, by name, and what can be selected of them."""
    found = {}
    for name, layer in targeted(model, config.target_modules, "method").items():
        rows, columns = layer.weight.shape  # type: ignore[misc]
        granularity, width = config.granularity, _width(model, name, config.granularity)
        if isinstance(layer, Conv1D) and granularity is not Granularity.element:
            flipped = {Granularity.inputs: Granularity.outputs, Granularity.outputs: Granularity.inputs}
            granularity = flipped[granularity]
        found[name] = (layer, Target(int(rows), int(columns), granularity, width))
    return found


def _width(model: nn.Module, name: str, granularity: Granularity) -> int:
    """The channels that are selected together: those of a head, where a layer's are a head's; else one."""
    settings: Any = getattr(model, "config", None)
    family = FAMILIES.get(getattr(settings, "model_type", ""))
    if family is None or granularity is Granularity.element:
        return 1
    table = family.inputs if granularity is Granularity.inputs else family.outputs
    units = next((units for path, units in table.items() if name.endswith(f".{path}")), ())
    if units not in ((Q,), (KV,)):
        return 1
    head_size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return int(head_size)


def select(
    model: nn.Module,
    config: Sparse,
    seed: int,
    ranks: Ranks,
    subjects: Callable[[str, bool], Subject | None] | None = None,
) -> tuple[dict[str, torch.Tensor], int]:
    """The entries, columns or rows to train of every layer, by what its selector reads; and how many were near.

    `model` is whole on every rank, unless `subjects(name, mine)` gives what is judged instead to the owner.
    """
    found = targets_of(model, config)
    names = list(found)

    def scorer(number: int, mine: bool) -> torch.Tensor | None:
        name = names[number]
        layer, target = found[name]
        if subjects is not None:
            subject = subjects(name, mine)
        else:
            weight = layer.weight.detach().to(ranks.device).float() if mine else None  # type: ignore[operator]
            subject = None if weight is None else Subject(weight, selection_key(seed, name, 0), config.rank)
        if subject is None:
            return None
        return scores_of(config.selector, subject, target.granularity, target.width).to(ranks.device)

    by_name = {name: target for name, (_, target) in found.items()}
    if config.allocator is Allocator.whole:
        chosen, near = choose_together(scorer, len(names), together(config, by_name), ranks)
    elif config.allocator is Allocator.threshold:
        chosen, near = choose_above(scorer, len(names), -config.threshold, ranks)
    else:
        counts = counts_of(config, by_name)
        chosen, near = choose_each(scorer, [counts[name] for name in names], ranks)
    if not any(indices.numel() for indices in chosen):
        raise Refused(
            f"method={config.name} selects nothing: no weight is below method.threshold={config.threshold:g}. Type a "
            "larger one."
        )
    widths = [by_name[name].width for name in names]
    return {n: _channels(c, w) for n, c, w in zip(names, chosen, widths, strict=True) if c.numel()}, near


def _channels(slices: torch.Tensor, width: int) -> torch.Tensor:
    """The columns or rows of slices of `width`."""
    return (slices[:, None] * width + torch.arange(width, device=slices.device)).reshape(-1)
