"""What a rank's shard file looks like, laid out once for many snapshots, and copying the state into it.

The same bytes as `writer.write_shard` writes for the same plan, pieces, objects and save id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
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
from checkpointing.geometry import Box, Piece, intersect
from checkpointing.plan import RankPlan
from checkpointing.tensors import multiplied, scalar_hex

_NO_ID = "0" * 32  # as long as every save id
# Copied before it is hashed: it is still in the processor's cache then. Larger parts are shared out among threads.
CHUNK_BYTES = 512 * 1024
_WORDS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `first` to `last` of a stored panel: where they come from, and the bytes of the shard file they become.

    Parts of one panel end where blocks of checksums do, but for its last.
    """

    piece: int  # its position among the rank's pieces
    slices: tuple[slice, ...]  # of the piece's tensor: the panel
    shape: tuple[int, ...]
    start: int  # of the panel, in the file
    nbytes: int  # of the panel
    sums: int  # where the panel's checksums start in the file
    begin: int  # bytes begin to end of the panel are this part's
    end: int


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
        """After all parts were copied: what the manifest says of this writer, and its index."""
        values = {}
        for name, position in self._scalars.items():
            values[name] = scalar_hex(multiplied(pieces[position].tensor, pieces[position].divisor))
        sums = digest(target[self._sums : self.nbytes])
        index = encode_index(Index(save_id, self._placed, sums, values, objects), self.plan.tensors)
        header = digest(target[: self._data])
        return Writer(self.rank, self.nbytes, len(index), header, digest(index), self.plan.cover), index

    def _parts_of(self, stored: StoredBox, pieces: Sequence[Piece]) -> list[Part]:
        tensor = self.plan.tensors[stored.name]
        holders = [n for n, piece in enumerate(pieces) if piece.name == stored.name]
        position = next(n for n in holders if intersect(pieces[n].box, stored.box) == stored.box)
        found = []
        for panel in stored_panels(stored, tensor):
            nbytes = panel.box.numel * tensor.itemsize
            where = panel.box.slices(pieces[position].offset)
            common = position, where, panel.box.size, self._data + panel.start, nbytes, self._sums + panel.sums
            step = _step(panel.box, nbytes)
            found += [Part(*common, begin, min(begin + step, nbytes)) for begin in range(0, nbytes, step)]
        return found


def _positions(pieces: Sequence[Piece], names: Sequence[str]) -> dict[str, int]:
    first: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        first.setdefault(piece.name, number)
    return {name: first[name] for name in names}


# A part is this large at the least, so that few are handed about.
_PART_BYTES = 8 * 1024 * 1024


def _step(panel: Box, nbytes: int) -> int:
    """How many bytes of a panel are one part: whole rows that are whole blocks, or all of it where such are many."""
    unit = lcm(nbytes // panel.size[0], block_size(nbytes))
    return nbytes if unit > _PART_BYTES else unit * (_PART_BYTES // unit)


def copy_part(part: Part, piece: Piece, target: memoryview) -> None:
    """Copy one part of the state into the file's memory, and its checksums.

    For any thread: the interpreter is free while bytes are copied and hashed.
    """
    source = piece.tensor.detach()[part.slices]
    block = block_size(part.nbytes)
    memory = target[part.start : part.start + part.nbytes]
    if source.device.type != "cpu" or piece.divisor != 1 or source.is_conj() or source.is_neg():
        _copy_slowly(part, source, piece.divisor, memory)
        done = checksums(memory[part.begin : part.end], block)
    else:
        done = _copy_and_hash(part, source, memory, block)
    at = part.sums + SUM * (part.begin // block)
    target[at : at + len(done)] = done


def _copy_and_hash(part: Part, source: torch.Tensor, memory: memoryview, block: int) -> bytes:
    rows = source.shape[0]
    row = part.nbytes // rows
    array = source.view(_WORDS[source.element_size()]).numpy()
    there = np.frombuffer(memory, array.dtype).reshape(array.shape)
    first, last = part.begin // row, part.end // row
    step = max(1, CHUNK_BYTES // row)
    sums: list[bytes] = []
    hashed = part.begin
    for begin in range(first, last, step):
        end = min(begin + step, last)
        np.copyto(there[begin:end], array[begin:end])
        # Whole blocks, while they are in the cache; what is left of one waits for the rest of it.
        ready = part.end if end == last else end * row // block * block
        if ready > hashed:
            sums.append(checksums(memory[hashed:ready], block))
            hashed = ready
    return b"".join(sums)


def _copy_slowly(part: Part, source: torch.Tensor, divisor: float, memory: memoryview) -> None:
    """From a GPU, or of what is not stored as it is held."""
    there = torch.frombuffer(memory[part.begin : part.end], dtype=source.dtype)
    values = multiplied(_rows(part, source), divisor).resolve_conj().resolve_neg()
    there.view(values.shape).copy_(values, non_blocking=True)  # the thread's stream alone is waited for
    if source.is_cuda:
        torch.cuda.current_stream(source.device).synchronize()


def _rows(part: Part, source: torch.Tensor) -> torch.Tensor:
    row = part.nbytes // source.shape[0]
    return source[part.begin // row : part.end // row]


def is_as_copied(part: Part, piece: Piece, target: memoryview) -> bool:
    """Whether a part of the state still has the checksums that were written with it, and its copy has them too."""
    source = piece.tensor.detach()[part.slices]
    copy = torch.empty(part.end - part.begin, dtype=torch.uint8)
    _copy_slowly(
        replace(part, begin=0, end=len(copy), nbytes=len(copy)), _rows(part, source), piece.divisor, copy.numpy().data
    )
    block = block_size(part.nbytes)
    at = part.sums + SUM * (part.begin // block)
    found = [
        checksums(data, block) for data in (copy.numpy().data, target[part.start + part.begin : part.start + part.end])
    ]
    return all(sums == target[at : at + len(sums)] for sums in found)
