"""A sparse layer's weight as this rank holds it: where its entries lie in shards, read and written there.

An engine describes its shards as pieces, and that is all that is known of the engine here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from checkpointing import Piece
from trainer.methods.entries import added
from trainer.options.method import Granularity

# What an element is where a rank does not hold it, in a maximum over the bits of all ranks: minus zero, as an integer
# the least there is.
NOWHERE = -(2**31)


@dataclass(frozen=True)
class PlacePart:
    """Some of the entries, or of the columns or rows, in one piece of the weight."""

    tensor: torch.Tensor
    index: tuple[torch.Tensor | slice, ...]  # in the tensor
    chosen: tuple[torch.Tensor | slice, ...]  # among all values


class EntryPlace:
    """Where the entries of one weight lie on this rank."""

    def __init__(self, pieces: Sequence[Piece], indices: torch.Tensor, granularity: Granularity) -> None:
        indices = indices.long()
        self.parts = [
            part
            for piece in {piece.memory: piece for piece in pieces}.values()
            if (part := _part(piece, indices, granularity)) is not None
        ]

    def write(self, originals: torch.Tensor, values: torch.Tensor) -> None:
        """Base plus values. Where a value is zero that is the base, bit for bit."""
        for part in self.parts:
            base = originals[part.chosen]
            part.tensor[part.index] = added(base, values[part.chosen])

    def revert(self, originals: torch.Tensor) -> None:
        for part in self.parts:
            part.tensor[part.index] = originals[part.chosen]

    def read(self, like: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Read the weight there, in the form of `like`, on all ranks. Collective."""
        found = torch.full_like(like, -0.0, dtype=torch.float32)
        for part in self.parts:
            found[part.chosen] = part.tensor[part.index].float()
        return spread(found, group).to(like.dtype)


def _part(piece: Piece, indices: torch.Tensor, granularity: Granularity) -> PlacePart | None:
    (top, left), (rows, columns) = piece.offset, piece.tensor.shape
    tensor = piece.tensor.detach()
    if granularity is Granularity.element:
        row, column = indices // piece.global_shape[1] - top, indices % piece.global_shape[1] - left
        inside = ((row >= 0) & (row < rows) & (column >= 0) & (column < columns)).nonzero()[:, 0]
        if not inside.numel():
            return None
        row, column = row[inside], column[inside]
        flat = tensor.is_contiguous()
        index = (short(row * columns + column, tensor.numel()),) if flat else (short(row, rows), short(column, columns))
        everything = inside.numel() == indices.numel()
        chosen = slice(None) if everything else short(inside, indices.numel())
        return PlacePart(tensor.view(-1) if flat else tensor, index, (chosen,))
    by_columns = granularity is Granularity.inputs
    places, length = (indices - left, columns) if by_columns else (indices - top, rows)
    inside = ((places >= 0) & (places < length)).nonzero()[:, 0]
    if not inside.numel() or not piece.tensor.numel():
        return None
    if by_columns:
        return PlacePart(tensor, (slice(None), places[inside]), (slice(top, top + rows), inside))
    return PlacePart(tensor, (places[inside], slice(None)), (inside, slice(left, left + columns)))


def short(indices: torch.Tensor, below: int) -> torch.Tensor:
    """Shorten int64 indices to int32 where they fit: they are kept as long as the entries are."""
    return indices.int() if below <= 2**31 else indices


def spread(partial: torch.Tensor, group: dist.ProcessGroup | None, to: int | None = None) -> torch.Tensor:
    """Join fp32 tensors that are minus zero where a rank holds nothing, bit for bit.

    On all ranks, or on rank `to` of the group. In place; those that hold an element must hold the same. Collective.
    """
    if group is not None:
        bits = partial.view(torch.int32)
        if to is None:
            dist.all_reduce(bits, dist.ReduceOp.MAX, group=group)
        else:
            dist.reduce(bits, group_dst=to, op=dist.ReduceOp.MAX, group=group)
    return partial


def assemble(
    pieces: Sequence[Piece],
    group: dist.ProcessGroup | None,
    device: torch.device,
    to: int | None = None,
    shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """A whole logical tensor, as fp32, of its pieces on all ranks; a rank without any tells its shape. Collective."""
    shape = shape or pieces[0].global_shape
    found = torch.full(shape, -0.0, device=device)
    for piece in pieces:
        found[piece.box.slices((0,) * len(shape))] = piece.tensor.detach().float()
    return spread(found, group, to)


def put_back(pieces: Sequence[Piece], whole: torch.Tensor) -> None:
    """Fill a rank's pieces of a logical tensor from the whole of it."""
    for piece in pieces:
        piece.tensor.detach().copy_(whole[piece.box.slices((0,) * whole.dim())])


def by_name(pieces: Sequence[Piece], wanted: Callable[[str], bool]) -> Mapping[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        if wanted(piece.name):
            found.setdefault(piece.name, []).append(piece)
    return found
