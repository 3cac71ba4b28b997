"""Pieces of plain tensors and of DTensors on any mesh: sharded, replicated, strided, uneven or empty."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from checkpointing.errors import LayoutError
from checkpointing.geometry import Interval, Piece, Shape


def pieces_of(name: str, tensor: torch.Tensor, logical_shape: Shape | None = None) -> list[Piece]:
    """The pieces of one logical tensor that this rank holds; a plain tensor is one piece, the whole.

    With `logical_shape` the tensor is padded at the ends of some dimensions, such as a vocabulary, and only what lies
    in that shape is described; padding is left as it is by a load. A `Partial("avg")` placement is stored as the mean.
    """
    shape = tuple(tensor.shape) if logical_shape is None else tuple(logical_shape)
    if len(shape) != tensor.dim() or any(n > padded for n, padded in zip(shape, tensor.shape, strict=True)):
        raise LayoutError(f"{name}: a tensor of shape {tuple(tensor.shape)} does not hold one of shape {shape}")
    if not isinstance(tensor, DTensor):
        whole = tensor if logical_shape is None else tensor[tuple(map(slice, shape))]
        return [Piece(name, whole, (0,) * len(shape), shape)]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is not part of the mesh
        return []
    if 0 in shape:  # nothing to hold, but a tensor that must be named
        return [Piece(name, tensor.to_local().detach().new_empty(shape), (0,) * len(shape), shape)]
    held = held_intervals(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tuple(coordinate), tensor.placements)
    local = tensor.to_local()
    expected = tuple(sum(length for _, length in runs) for runs in held)
    if tuple(local.shape) != expected:
        raise LayoutError(f"{name}: {tensor.placements} should hold {expected} here, and holds {tuple(local.shape)}")
    mean = any(placement.is_partial("avg") for placement in tensor.placements)
    return Piece.runs(name, local, held, shape, mean)


def held_intervals(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> list[list[Interval]]:
    """For each dimension, the ranges of the logical tensor that a DTensor's local tensor holds, in local order.

    Every placement cuts one dimension, so the local tensor is the product of its dimensions' ranges.
    """
    held: list[list[Interval]] = [[(0, size)] for size in shape]
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
