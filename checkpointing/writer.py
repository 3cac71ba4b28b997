"""Write one rank's shard file and index: a sequential write, checksums computed as the bytes pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import xxhash

from checkpointing.format import (
    Index,
    StoredBox,
    Writer,
    block_size,
    checksums,
    digest,
    encode_index,
    index_name,
    lay_out,
    panels_of,
    scalar_hex,
    shard_name,
    tensor_bytes,
)
from checkpointing.geometry import Box, Piece, intersect
from checkpointing.plan import RankPlan
from checkpointing.storage import Storage

CHUNK_BYTES = 32 * 1024 * 1024  # what is copied at a time from a tensor that is not contiguous host memory


def write_shard(
    storage: Storage,
    directory: str,
    plan: RankPlan,
    pieces: Sequence[Piece],
    rank: int,
    save_id: str,
    objects: dict[str, Any],
) -> Writer | None:
    """Write what the plan elects this rank to write. None where that is nothing; rank 0 always writes an index."""
    boxes, scalars = plan.boxes, plan.scalars
    if not (boxes or scalars or rank == 0):
        return None
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    header, placed = lay_out(boxes, plan.tensors, save_id)
    written: list[StoredBox] = []
    shard_bytes = 0

    def chunks() -> Iterator[bytes | memoryview]:
        nonlocal shard_bytes
        shard_bytes += len(header)
        yield header
        for stored in placed:
            sums = []
            tensor = plan.tensors[stored.name]
            for panel in panels_of(stored.box, tensor):
                hasher = BlockHasher(block_size(panel.numel * tensor.itemsize))
                for chunk in box_bytes(by_name[stored.name], panel):
                    hasher.update(chunk)
                    shard_bytes += len(chunk)
                    yield chunk
                sums.append(hasher.finish())
            written.append(replace(stored, checksums="".join(sums)))

    storage.put(f"{directory}/{shard_name(rank)}", chunks())
    values = {name: scalar_hex(by_name[name][0].tensor) for name in scalars}
    index = encode_index(Index(save_id, written, values, objects), list(plan.tensors))
    storage.put(f"{directory}/{index_name(rank)}", [index])
    return Writer(rank, shard_bytes, len(index), digest(header), digest(index))


def box_bytes(pieces: Sequence[Piece], box: Box) -> Iterator[memoryview]:
    """The row-major bytes of a box that one of the pieces holds, a bounded number of bytes at a time."""
    piece = next(p for p in pieces if intersect(p.box, box) == box)
    view = piece.tensor.detach()[box.slices(piece.offset)]
    # Only whole leading rows are split off: the bytes of a row-major box are those of its rows, one after the other.
    rows = max(1, CHUNK_BYTES * box.size[0] // (box.numel * view.element_size()))
    for part in torch.split(view, rows):
        yield tensor_bytes(part)


class BlockHasher:
    """Checksums of consecutive blocks of a stream whose chunks do not end where blocks do."""

    def __init__(self, block: int) -> None:
        self._block, self._room = block, block
        self._hash = xxhash.xxh3_64()
        self._sums: list[str] = []

    def update(self, chunk: memoryview) -> None:
        if self._room < self._block:  # a block that an earlier chunk began
            chunk = self._fill_block(chunk)
        whole = len(chunk) // self._block * self._block
        self._sums.append(checksums(chunk[:whole], self._block))
        self._fill_block(chunk[whole:])

    def finish(self) -> str:
        if self._room < self._block:
            self._close_block()
        return "".join(self._sums)

    def _fill_block(self, chunk: memoryview) -> memoryview:
        part, rest = chunk[: self._room], chunk[self._room :]
        self._hash.update(part)
        self._room -= len(part)
        if self._room == 0:
            self._close_block()
        return rest

    def _close_block(self) -> None:
        self._sums.append(self._hash.hexdigest())
        self._hash.reset()
        self._room = self._block
