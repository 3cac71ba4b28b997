"""Write one rank's shard file and index: a sequential write, checksums computed as the bytes pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from checkpointing.codec import encode_index
from checkpointing.errors import LayoutError
from checkpointing.format import (
    HEADER_BYTES,
    METADATA_BYTES,
    Index,
    Writer,
    block_size,
    checksums,
    digest,
    index_name,
    lay_out,
    panels_of,
    shard_name,
    stored_bytes,
)
from checkpointing.geometry import Box, Piece, intersect
from checkpointing.plan import RankPlan
from checkpointing.storage import WRITES_BEHIND, Storage
from checkpointing.tensors import multiplied, row_bytes, scalar_hex

# The memory for copies of state on its way to storage, or from it, that a rank may use beside the state.
DEFAULT_BUDGET = 256 * 1024 * 1024
LEAST_BUDGET = 1024 * 1024


def write_shard(
    storage: Storage,
    directory: str,
    plan: RankPlan,
    pieces: Sequence[Piece],
    rank: int,
    save_id: str,
    objects: dict[str, Any],
    budget: int = DEFAULT_BUDGET,
) -> Writer | None:
    """Write what the plan elects this rank to write. None where that is nothing; rank 0 always writes an index.

    Copies of what is not contiguous host memory take at most `budget` bytes at a time.
    """
    boxes, scalars = plan.boxes, plan.scalars
    if not (boxes or scalars or rank == 0):
        return None
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    header, placed = lay_out(boxes, plan.tensors, save_id)
    _check_size(len(header), "header", rank, HEADER_BYTES)
    _check_size(stored_bytes(placed, plan.tensors)[1], "checksums", rank, METADATA_BYTES)
    sums: list[bytes] = []
    shard_bytes = 0
    limit = budget // (2 * (WRITES_BEHIND + 2))  # a chunk is copied, hashed and written, and a cast may double it

    def chunks() -> Iterator[bytes | memoryview]:
        nonlocal shard_bytes
        shard_bytes += len(header)
        yield header
        for stored in placed:
            tensor = plan.tensors[stored.name]
            for panel in panels_of(stored.box, tensor):
                hasher = BlockHasher(block_size(panel.numel * tensor.itemsize))
                for chunk in box_bytes(by_name[stored.name], panel, limit):
                    hasher.update(chunk)
                    shard_bytes += len(chunk)
                    yield chunk
                sums.append(hasher.finish())
        sums[:] = [b"".join(sums)]
        shard_bytes += len(sums[0])
        yield sums[0]

    storage.put(f"{directory}/{shard_name(rank)}", chunks())
    values = {name: scalar_hex(multiplied(by_name[name][0].tensor, by_name[name][0].divisor)) for name in scalars}
    index = encode_index(Index(save_id, placed, digest(sums[0]), values, objects), plan.tensors)
    _check_size(len(index), "index", rank, METADATA_BYTES)
    storage.put(f"{directory}/{index_name(rank)}", [index])
    return Writer(rank, shard_bytes, len(index), digest(header), digest(index), plan.cover)


def _check_size(size: int, what: str, rank: int, most: int) -> None:
    if size > most:
        raise LayoutError(
            f"the {what} of rank {rank} would have {size:,} bytes, and at most {most:,} are read again; "
            "keep large values in tensors rather than in objects, or save with more ranks"
        )


def box_bytes(pieces: Sequence[Piece], box: Box, limit: int | None = None) -> Iterator[memoryview]:
    """The row-major bytes of a box that one of the pieces holds, a bounded number of bytes at a time."""
    piece = next(p for p in pieces if intersect(p.box, box) == box)
    return row_bytes(piece.tensor.detach()[box.slices(piece.offset)], limit, piece.divisor)


class BlockHasher:
    """Checksums of consecutive blocks of a stream whose chunks do not end where blocks do."""

    def __init__(self, block: int) -> None:
        self._block, self._room = block, block
        self._hash = xxhash.xxh3_64()
        self._sums: list[bytes] = []

    def update(self, chunk: memoryview) -> None:
        if self._room < self._block:  # a block that an earlier chunk began
            chunk = self._fill_block(chunk)
        whole = len(chunk) // self._block * self._block
        self._sums.append(checksums(chunk[:whole], self._block))
        self._fill_block(chunk[whole:])

    def finish(self) -> bytes:
        if self._room < self._block:
            self._close_block()
        return b"".join(self._sums)

    def _fill_block(self, chunk: memoryview) -> memoryview:
        part, rest = chunk[: self._room], chunk[self._room :]
        self._hash.update(part)
        self._room -= len(part)
        if self._room == 0:
            self._close_block()
        return rest

    def _close_block(self) -> None:
        self._sums.append(self._hash.digest())
        self._hash.reset()
        self._room = self._block
