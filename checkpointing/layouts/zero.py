"""Pieces of a DeepSpeed engine, ZeRO stages 0 to 3, by the ranges that its flat partitions hold.

DeepSpeed is not imported: its optimizers are told apart by what they hold. Ranges are computed from their partitions,
and not taken from DeepSpeed's links of parameters to moments, which leave out a second param group until it stepped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from checkpointing.errors import LayoutError
from checkpointing.geometry import Piece, Shape, Slice
from checkpointing.layouts.module import describe, materialize, parameter_names


def describe_zero(engine: Any) -> list[Piece]:
    """The pieces of a DeepSpeed engine on this rank, named as `describe` names those of its module and optimizer.

    Of a parameter that trains, the full-precision master is described, of a frozen one the only copy. Optimizer state
    that does not exist yet is created. After a load call `publish_zero`. `LayoutError` for what is kept in files
    (NVMe) or quantized, and for optimizers other than torch's. The scale of an fp16 loss belongs into `objects`.
    """
    if isinstance(engine.optimizer, Optimizer):  # stage 0 in fp32: nothing is wrapped
        return describe(engine.module, engine.optimizer)
    groups = _groups(engine.optimizer)
    _undo_first_step(engine)
    with _complete(engine.optimizer):
        materialize(engine.optimizer.optimizer)
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in parameter_names(engine.module).items():
        names.setdefault(tensor, []).append(name)
    pieces = [piece for piece in describe(engine.module) if piece.name.startswith("buffer/")]
    trained: set[torch.Tensor] = set()
    for group in groups:
        state = _state(engine.optimizer.optimizer, group.master)
        for parameter, at in zip(group.parameters, group.held, strict=True):
            if parameter not in names:
                raise LayoutError(f"the optimizer holds a parameter of shape {at.shape} that is not in the model")
            trained.add(parameter)
            for name in names[parameter]:
                pieces += at.pieces(f"model/{name}", group.master)
                for key, value in state.items():
                    pieces += at.pieces(f"optim/{name}/{key}", value)
    untrained = ((name, parameter) for parameter in names if parameter not in trained for name in names[parameter])
    return pieces + [piece for name, parameter in untrained for piece in _untrained(f"model/{name}", parameter)]


def publish_zero(engine: Any) -> None:
    """Rebuild after a load what DeepSpeed computes with: full, gathered and low-precision copies. Collective."""
    optimizer = engine.optimizer
    if isinstance(optimizer, Optimizer):
        return
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()  # small ones stay gathered otherwise, with their values from before
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.data.copy_(master.data)


def held_in_partition(engine: Any, master: torch.Tensor) -> list[Slice]:
    """The contents of a flat partition, or of a whole master, on this rank.

    Every parameter in it, in the same order on all ranks.
    """
    for group in _groups(engine.optimizer):
        if group.master is master:
            return [
                Slice(parameter, held.start, max(0, min(held.length, prod(held.shape) - held.start)), held.position)
                for parameter, held in zip(group.parameters, group.held, strict=True)  # padding left out
            ]
    raise LayoutError(f"a tensor of shape {tuple(master.shape)} is no partition of this engine")


@dataclass(frozen=True, slots=True)
class _Held:
    """Which elements of a parameter a flat partition holds: `length` of them from `start`, at `position` in it."""

    position: int
    start: int
    length: int
    shape: Shape

    def pieces(self, name: str, flat: torch.Tensor) -> list[Piece]:
        """Pieces of the master, or of a state of its form. A scalar, such as the step, is whole on every rank."""
        flat = flat.detach()
        if flat.dim() == 0:
            return [Piece(name, flat, (), ())]
        part = flat.reshape(-1)[self.position : self.position + self.length]
        return Piece.flat(name, part, self.start, self.shape)


class _Group(NamedTuple):
    """Parameters whose masters lie in one flat partition, and what that holds of each on this rank."""

    parameters: Sequence[torch.Tensor]
    held: Sequence[_Held]
    master: torch.Tensor


def _groups(optimizer: Any) -> list[_Group]:
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _partitioned_each(optimizer)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return _partitioned_together(
            optimizer,
            optimizer.round_robin_bit16_groups,
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_offsets,
        )
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        parameters = optimizer.bf16_groups
        offsets = [list(accumulate((p.numel() for p in group), initial=0))[:-1] for group in parameters]
        return _partitioned_together(optimizer, parameters, optimizer.fp32_groups_flat_partition, offsets)
    if hasattr(optimizer, "fp32_groups") and hasattr(optimizer, "fp16_groups"):
        return [
            _Group([p], [_Held(0, 0, p.numel(), tuple(p.shape))], master)
            for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for p, master in zip(parameters, masters, strict=True)
        ]
    raise LayoutError(f"it is not known what a {type(optimizer).__name__} of DeepSpeed holds of each parameter")


def _partitioned_together(optimizer: Any, groups: Any, masters: Any, offsets: Any) -> list[_Group]:
    """Stages 1 and 2: a group's parameters lie one after the other, and every rank has an equal range of them all."""
    found = []
    for number, (parameters, master) in enumerate(zip(groups, masters, strict=True)):
        left = dist.get_rank(group=optimizer.real_dp_process_group[number]) * master.numel()
        held = []
        for parameter, offset in zip(parameters, offsets[number], strict=True):
            first = min(max(offset, left), left + master.numel())
            last = max(first, min(offset + parameter.numel(), left + master.numel()))
            held.append(_Held(first - left, max(first - offset, 0), last - first, tuple(parameter.shape)))
        found.append(_Group(parameters, held, master))
    return found


def _partitioned_each(optimizer: Any) -> list[_Group]:
    """Stage 3: every rank has an equal range of each parameter, and a group's lie one after the other."""
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise LayoutError("what DeepSpeed keeps on NVMe cannot be described; offload to the CPU instead")
    found = []
    for parameters, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        sizes = [parameter.partition_numel() for parameter in parameters]
        held = [
            _Held(position, parameter.ds_zero_partition_rank * size, size, tuple(parameter.ds_shape))
            for parameter, size, position in zip(parameters, sizes, accumulate(sizes, initial=0), strict=False)
        ]
        found.append(_Group(parameters, held, master))
    return found


def _untrained(name: str, parameter: Any) -> list[Piece]:
    """A parameter without a master: stage 3 shards it as well, the others keep it whole on every rank."""
    if not hasattr(parameter, "ds_tensor"):
        return [Piece(name, parameter.detach(), (0,) * parameter.dim(), tuple(parameter.shape))]
    shape, partition = tuple(parameter.ds_shape), parameter.ds_tensor.detach()
    if hasattr(parameter.ds_tensor, "ds_quant_scale"):
        raise LayoutError(f"{name} is quantized: leave zero_quantized_nontrainable_weights out")
    if parameter.ds_numel == 0:
        return [Piece(name, partition.new_empty(shape), (0,) * len(shape), shape)]
    return Piece.flat(name, partition, parameter.ds_zero_partition_rank * partition.numel(), shape)


def _state(optimizer: Optimizer, master: torch.Tensor) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = optimizer.state.get(master, {})
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or (value.dim() and value.shape != master.shape):
            raise LayoutError(f"the optimizer keeps {key} neither as a scalar nor in the form of a parameter")
    return state


@contextmanager
def _complete(optimizer: Any) -> Iterator[None]:
    """Stage 3 has its partitions in the param groups only while they step."""
    partial = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if partial:
        optimizer._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        if partial:
            optimizer._clear_fp32_optimizer_param_groups()


def _undo_first_step(engine: Any) -> None:
    """Stage 0 in low precision takes a step with zero gradients when it starts, which decays the masters.

    Before the engine's own first step the parameters still hold what the masters were made from.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "initialize_optimizer_states") and isinstance(getattr(optimizer, "fp32_groups", None), list):
        if engine.global_steps or getattr(optimizer, "_first_step_undone", False):
            return
        optimizer._first_step_undone = True
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                master.data.copy_(parameter.data)
                for value in optimizer.optimizer.state.get(master, {}).values():
                    value.zero_()
