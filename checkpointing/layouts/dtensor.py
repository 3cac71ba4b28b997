"""Pieces of plain tensors and of DTensors on any mesh: sharded, replicated, strided, uneven or empty."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from checkpointing.errors import LayoutError
from checkpointing.geometry import Interval, Piece, Shape


class Held(NamedTuple):
    """A tensor-parallel rank's part of a logical tensor of `shape`, before it is sharded further.

    `ranges` has for every dimension the (start, length) of the logical ranges that lie there one after the other, such
    as the rows of query, key and value heads in a fused projection. What reaches past the end is padding.
    """

    shape: Shape
    ranges: Sequence[Sequence[Interval]]


def pieces_of(name: str, tensor: torch.Tensor, logical: Shape | Held | None = None) -> list[Piece]:
    """The pieces of one logical tensor that this rank holds; a plain tensor is one piece, the whole.

    With a shape as `logical` the tensor is padded at the ends of some dimensions, such as a vocabulary, and only what
    lies in that shape is described; padding is left as it is by a load. With `Held` the tensor (of a DTensor: the whole
    that its mesh shards) is a part of the logical one. A `Partial("avg")` placement is stored as the mean.
    """
    if isinstance(logical, Held):
        shape, ranges = logical
        fits = [sum(length for _, length in runs) for runs in ranges] == list(tensor.shape)
    else:
        shape, ranges = tuple(tensor.shape if logical is None else logical), [[(0, size)] for size in tensor.shape]
        fits = all(n <= padded for n, padded in zip(shape, tensor.shape, strict=False))
    if not fits or len(shape) != tensor.dim():
        raise LayoutError(f"{name}: a tensor of shape {tuple(tensor.shape)} does not hold one of shape {shape}")
    coordinate = tensor.device_mesh.get_coordinate() if isinstance(tensor, DTensor) else ()
    if coordinate is None:  # this rank is not part of the mesh
        return []
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if 0 in shape:  # nothing to hold, but a tensor that must be named
        return [Piece(name, local.detach().new_empty(shape), (0,) * len(shape), shape)]
    if not isinstance(tensor, DTensor):
        return Piece.runs(name, tensor, ranges, shape) if logical else [Piece(name, tensor, (0,) * len(shape), shape)]
    mesh = tuple(tensor.device_mesh.shape)
    held = _held(tuple(map(tuple, ranges)), mesh, tuple(coordinate), tensor.placements)
    expected = tuple(sum(length for _, length in runs) for runs in held)
    if tuple(local.shape) != expected:
        raise LayoutError(f"{name}: {tensor.placements} should hold {expected} here, and holds {tuple(local.shape)}")
    mean = any(placement.is_partial("avg") for placement in tensor.placements)
    return Piece.runs(name, local, held, shape, mean)


def of_blocks(name: str, logical: Shape | Held, parameter: Shape, state: Shape) -> Shape | Held | None:
    """`logical` of a parameter for a state of it, which may have one value for a block of a row; None for other states.

    `LayoutError` where what is held begins or ends within a block.
    """
    if state == parameter:
        return logical
    if (
        len(state) < 2
        or len(state) != len(parameter)
        or state[:-1] != parameter[:-1]
        or not state[-1]
        or parameter[-1] % state[-1]
    ):
        return None
    shape, ranges = logical if isinstance(logical, Held) else (logical, [[(0, size)] for size in logical])
    block = parameter[-1] // state[-1]
    if any(n % block for n in (shape[-1], *(n for run in ranges[-1] for n in run))):
        raise LayoutError(f"{name} has a value for every {block} of a row, and its rows are cut within such a block")
    last = [(start // block, length // block) for start, length in ranges[-1]]
    cut = (*shape[:-1], shape[-1] // block)
    return Held(cut, [*ranges[:-1], last]) if isinstance(logical, Held) else cut


def held_intervals(
    ranges: Sequence[Sequence[Interval]],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> list[list[Interval]]:
    """The ranges of the logical tensor that a DTensor's local tensor holds, by dimension, in local order.

    `ranges` are those that the whole DTensor holds. Every placement cuts one dimension, so the local tensor is the
    product of its dimensions' ranges.
    """
    held: list[list[Interval]] = [list(runs) for runs in ranges]
    for size, at, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Replicate) or placement.is_partial("avg"):
            continue
        # torch chooses whether a strided shard is a Shard by class: ask for the narrower kind first.
        if isinstance(placement, _StridedShard):
            parts = _chunks(held[placement.dim], int(placement.split_factor))
            held[placement.dim] = _merge([run for part in parts for run in _chunk(part, size, at)])
        elif isinstance(placement, Shard):
            held[placement.dim] = _chunk(held[placement.dim], size, at)
        else:
            raise LayoutError(f"a tensor placed as {placement} has no single value; reduce it before describing it")
    return held


# Of a model's tensors many are alike, and they are described at every step.
_held = lru_cache(maxsize=4096)(held_intervals)


def _chunk(runs: list[Interval], num_chunks: int, at: int) -> list[Interval]:
    """The part of consecutive ranges that `torch.chunk` would give to chunk `at`."""
    total = sum(length for _, length in runs)
    step = -(-total // num_chunks)
    return _window(runs, min(at * step, total), min((at + 1) * step, total))


def _chunks(runs: list[Interval], num_chunks: int) -> list[list[Interval]]:
    return [_chunk(runs, num_chunks, at) for at in range(num_chunks)]


def _window(runs: list[Interval], start: int, stop: int) -> list[Interval]:
    """Local positions start to stop of consecutive ranges."""
    found, position = [], 0
    for begin, length in runs:
        left, right = max(start - position, 0), min(stop - position, length)
        if left < right:
            found.append((begin + left, right - left))
        position += length
    return found


def _merge(runs: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, length in runs:
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((start, length))
    return merged
