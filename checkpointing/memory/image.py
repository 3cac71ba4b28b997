"""A rank's shard file, laid out once for many snapshots, and the copying of the state into it.

The same bytes as `writer.write_shard` writes for the same plan, pieces, objects and save id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

import numpy as np
import torch

from checkpointing.codec import encode_index
from checkpointing.format import (
    SUM,
    Index,
    StoredBox,
    Writer,
    block_size,
    checksums,
    digest,
    lay_out,
    stored_bytes,
    stored_panels,
)
from checkpointing.geometry import Piece, intersect
from checkpointing.plan import RankPlan
from checkpointing.tensors import multiplied, scalar_hex, tensor_bytes

_NO_ID = "0" * 32  # as long as every save id
# Copied before it is hashed: it is still in the processor's cache then.
CHUNK_BYTES = 2 * 1024 * 1024
# Rows that are handed about together: few, and on a GPU enough that its copies are long.
PART_BYTES, GPU_PART_BYTES = 8 * 1024 * 1024, 64 * 1024 * 1024
_SUM = np.dtype(f"V{SUM}")
_WORDS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Panel:
    """Columns of a stored box, which lie together in the file."""

    columns: slice
    start: int  # in the file
    nbytes: int
    sums: int  # where its checksums start in the file


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Rows `first` to `last` of a stored box of so many `rows`: where they come from, and where they go.

    In every panel a part begins where a block of checksums does.
    """

    piece: int  # its position among the rank's pieces
    slices: tuple[slice, ...]  # of the piece's tensor: the box
    panels: tuple[Panel, ...]
    rows: int
    first: int
    last: int


class Image:
    """One rank's shard file and index under one plan."""

    def __init__(self, plan: RankPlan, pieces: Sequence[Piece], rank: int) -> None:
        self.plan, self.rank = plan, rank
        self._header, self._placed = lay_out(plan.boxes, plan.tensors, _NO_ID)
        self._id_at = self._header.index(f'"save_id":"{_NO_ID}"'.encode()) + len('"save_id":"')
        data, sums = stored_bytes(self._placed, plan.tensors)
        self._data = len(self._header)
        self._sums = self._data + data
        self.nbytes = self._sums + sums
        self._scalars = _positions(pieces, plan.scalars)
        self.parts = [part for stored in self._placed for part in self._parts_of(stored, pieces)]

    def start(self, target: memoryview, save_id: str) -> None:
        """Write the header of a new save into the file's memory."""
        target[: self._data] = self._header
        target[self._id_at : self._id_at + len(_NO_ID)] = save_id.encode()

    def finish(
        self, target: memoryview, pieces: Sequence[Piece], save_id: str, objects: dict[str, Any]
    ) -> tuple[Writer, bytes]:
        """End a copy: this writer's entry of the manifest, and its index."""
        values = {}
        for name, position in self._scalars.items():
            values[name] = scalar_hex(multiplied(pieces[position].tensor, pieces[position].divisor))
        sums = digest(target[self._sums : self.nbytes])
        index = encode_index(Index(save_id, self._placed, sums, values, objects), self.plan.tensors)
        header = digest(target[: self._data])
        return Writer(self.rank, self.nbytes, len(index), header, digest(index), self.plan.cover), index

    def _parts_of(self, stored: StoredBox, pieces: Sequence[Piece]) -> list[ImagePart]:
        tensor = self.plan.tensors[stored.name]
        holders = [n for n, piece in enumerate(pieces) if piece.name == stored.name]
        position = next(n for n in holders if intersect(pieces[n].box, stored.box) == stored.box)
        left = stored.box.offset[-1]
        panels = tuple(
            Panel(
                slice(panel.box.offset[-1] - left, panel.box.offset[-1] - left + panel.box.size[-1]),
                self._data + panel.start,
                panel.box.numel * tensor.itemsize,
                self._sums + panel.sums,
            )
            for panel in stored_panels(stored, tensor)
        )
        if len(panels) == 1:
            panels = (replace(panels[0], columns=slice(None)),)  # of one dimension it may be rows
        slices, rows = stored.box.slices(pieces[position].offset), stored.box.size[0]
        step = _step(panels, rows, GPU_PART_BYTES if pieces[position].tensor.is_cuda else PART_BYTES)
        return [
            ImagePart(position, slices, panels, rows, first, min(first + step, rows)) for first in range(0, rows, step)
        ]


def _positions(pieces: Sequence[Piece], names: Sequence[str]) -> dict[str, int]:
    first: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        first.setdefault(piece.name, number)
    return {name: first[name] for name in names}


def _step(panels: Sequence[Panel], rows: int, most: int) -> int:
    """How many rows of a box are one part: whole blocks in every panel, or all of them where such are many."""
    lines = [panel.nbytes // rows for panel in panels]
    blocks = [block_size(panel.nbytes) for panel in panels]
    unit = lcm(*(block // gcd(block, line) for block, line in zip(blocks, lines, strict=True)))
    return unit * (most // nbytes) if (nbytes := unit * sum(lines)) <= most else rows


def copy_part(part: ImagePart, piece: Piece, target: memoryview) -> None:
    """Copy one part of the state into the file's memory, and its checksums."""
    source = piece.tensor.detach()[part.slices][part.first : part.last]
    is_plain = piece.divisor == 1 and not (source.is_conj() or source.is_neg())
    if not is_plain:
        source = multiplied(source, piece.divisor).resolve_conj().resolve_neg()
    source = source.view(_WORDS[source.element_size()])
    if len({panel.nbytes for panel in part.panels}) > 1:
        _copy_panels(part, source, target)
    else:
        _copy_at_once(part, source, target)


def _copy_panels(part: ImagePart, source: torch.Tensor, target: memoryview) -> None:
    """One panel after the other: they are of different widths."""
    here = [source[..., panel.columns] for panel in part.panels]
    if source.is_cuda and len(here) > 1:
        here = [values.contiguous() for values in here]
    for panel, values in zip(part.panels, here, strict=True):
        size = panel.nbytes // source.element_size()
        there = torch.frombuffer(target, dtype=source.dtype, count=size, offset=panel.start)
        there.view(part.rows, *values.shape[1:])[part.first : part.last].copy_(values, non_blocking=True)
    _wait_for(source)
    for panel in part.panels:
        line, block = panel.nbytes // part.rows, block_size(panel.nbytes)
        sums = checksums(target[panel.start + part.first * line : panel.start + part.last * line], block)
        at = panel.sums + SUM * (part.first * line // block)
        target[at : at + len(sums)] = sums


def _copy_at_once(part: ImagePart, source: torch.Tensor, target: memoryview) -> None:
    """The rows of all panels, a few at a time: what is hashed is still in the processor's cache then.

    From a GPU all of them, which puts them in their order itself.
    """
    count, first_panel = len(part.panels), part.panels[0]
    nbytes = first_panel.nbytes
    line, block = nbytes // part.rows, block_size(nbytes)
    size = count * nbytes // source.element_size()
    here = source.view(*source.shape[:-1], count, -1).movedim(-2, 0) if count > 1 else source[None]
    there = torch.frombuffer(target, dtype=source.dtype, count=size, offset=first_panel.start)
    there = there.view(count, part.rows, *here.shape[2:])[:, part.first : part.last]
    blocks = -(-nbytes // block)
    sums = np.frombuffer(target, _SUM, count * blocks, first_panel.sums).reshape(count, blocks)
    begin, step = part.first * line, max(1, CHUNK_BYTES // (count * line))
    if source.is_cuda:
        ordered, step = here.contiguous(), part.last - part.first
        for to, values in [(there, ordered)] if step == part.rows else zip(there, ordered, strict=True):
            to.copy_(values, non_blocking=True)  # each to one place
        _wait_for(source)
    for row in range(part.first, part.last, step):
        last = min(row + step, part.last)
        if not source.is_cuda:
            there[:, row - part.first : last - part.first].copy_(here[:, row - part.first : last - part.first])
        end = nbytes if last == part.rows else last * line // block * block  # what is left waits for its block's rest
        found = b"".join([checksums(target[panel.start + begin : panel.start + end], block) for panel in part.panels])
        sums[:, begin // block : -(-end // block)] = np.frombuffer(found, _SUM).reshape(count, -1)
        begin = end


def _wait_for(source: torch.Tensor) -> None:
    """Until what this thread copies from a GPU is there; nothing else is waited for."""
    if source.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()


def is_as_copied(part: ImagePart, piece: Piece, target: memoryview) -> bool:
    """Whether a part of the state still has the checksums that were written with it, and its copy has them too."""
    source = piece.tensor.detach()[part.slices][part.first : part.last]
    for panel in part.panels:
        line, block = panel.nbytes // part.rows, block_size(panel.nbytes)
        begin, end = part.first * line, part.last * line
        here = tensor_bytes(multiplied(source[..., panel.columns], piece.divisor).resolve_conj().resolve_neg())
        at = panel.sums + SUM * (begin // block)
        for data in (here, target[panel.start + begin : panel.start + end]):
            sums = checksums(memoryview(data), block)
            if target[at : at + len(sums)] != sums:
                return False
    return True
