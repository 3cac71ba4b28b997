"""Read planned parts of stored boxes, verify the checksums of every block touched, and copy them into place.

Only the indexes that are asked for are read, and shard files only where the plan says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from checkpointing.errors import CheckpointError, DamagedError, LayoutError
from checkpointing.format import (
    HEADER_BYTES,
    MANIFEST,
    METADATA_BYTES,
    SUM,
    Index,
    Manifest,
    StoredBox,
    block_size,
    checksums,
    digest,
    index_name,
    lay_out,
    shard_name,
    stored_bytes,
    stored_panels,
)
from checkpointing.generations import read_index
from checkpointing.geometry import Box, Piece, check_tiling
from checkpointing.plan import (
    CHUNK_BYTES,
    Read,
    collecting_later,
    plan_load,
    position_in,
    stored_by_name,
    windows,
    writers_needed,
)
from checkpointing.storage import Storage
from checkpointing.tensors import DTYPES, divided, scalar_from_hex, tensor_over
from checkpointing.writer import DEFAULT_BUDGET

# Of the load before this one: save id, boxes, the writers needed, and reads with the position of their piece.
_last_plan: tuple[str, list[Any], set[int], list[tuple[int, StoredBox, Box, int]]] | None = None


class GenerationReader:
    """One committed generation: its manifest; indexes and shard files are read, and verified, on demand.

    `budget` bounds the bytes that are on their way from storage into tensors.
    """

    def __init__(self, storage: Storage, manifest: Manifest, budget: int = DEFAULT_BUDGET) -> None:
        self.storage = storage
        self.manifest = manifest
        # A window is read, and cast where it must be, by every thread; what waits for a thread has not been read.
        self._limit = max(64 * 1024, min(CHUNK_BYTES, budget // (4 * num_threads())))
        self._indexes: dict[int, Index] = {}
        self._sizes = storage.list(f"{manifest.generation}/")
        self._data_starts: dict[int, int] = {}
        self._sums: dict[int, bytes] = {}
        self._targets: dict[int, torch.Tensor | np.ndarray[Any, Any]] = {}  # by id of the piece, while it is filled

    def index(self, position: int) -> Index:
        """The index of the manifest's writer at `position`."""
        if position not in self._indexes:
            self._indexes[position] = read_index(self.storage, self.manifest, position)
        return self._indexes[position]

    @property
    def indexes(self) -> list[Index]:
        """All of them, in the order of the manifest's writers."""
        return [self.index(i) for i in range(len(self.manifest.writers))]

    @property
    def objects(self) -> dict[str, object]:
        return self.index(0).objects

    def load(self, pieces: Sequence[Piece]) -> None:
        """Fill pieces, which are named as stored, from the boxes and scalars of the generation."""
        self.fill(self.plan(pieces))
        scalars = {name: value for index in self._indexes.values() for name, value in index.scalars.items()}
        for piece in pieces:
            if piece.global_shape == ():
                if piece.name not in scalars:
                    raise DamagedError(f"{piece.name} has no value in any index of {self.manifest.generation}")
                dtype = DTYPES[self.manifest.tensors[piece.name].dtype]
                value = scalar_from_hex(scalars[piece.name], dtype, piece.name)
                with torch.no_grad():
                    piece.tensor.detach().copy_(divided(value, piece.divisor, piece.tensor.dtype))

    @collecting_later()
    def plan(self, pieces: Sequence[Piece]) -> list[Read]:
        """Plan the reads for pieces, from the indexes that may hold them.

        The last plan is used again for the same boxes of the same generation: a run that goes back to it again.
        """
        global _last_plan
        # Positions are those of this manifest: in memory a node's names its own ranks alone, under the same save id.
        writers = tuple(writer.rank for writer in self.manifest.writers)
        layout = [writers, *((piece.name, piece.offset, piece.tensor.shape) for piece in pieces)]
        last = _last_plan  # another thread may replace it meanwhile
        if last is not None and last[:2] == (self.manifest.save_id, layout):
            _, _, needed, reads = last
            for position in needed:
                self.index(position)
            return [Read(writer, stored, part, pieces[number]) for writer, stored, part, number in reads]
        needed = writers_needed(pieces, self.manifest)
        found = plan_load(pieces, stored_by_name({i: self.index(i) for i in sorted(needed)}), self.manifest.tensors)
        number = {id(piece): n for n, piece in enumerate(pieces)}
        reads = [(read.writer, read.stored, read.part, number[id(read.piece)]) for read in found]
        _last_plan = (self.manifest.save_id, layout, needed, reads)
        return found

    def fill(self, reads: Iterable[Read]) -> None:
        """Copy every planned part into its piece, in place. Several threads read, check and copy at a time."""
        self._targets.clear()
        fetches = [
            self._fetch(read.writer, read.stored, window, part, read.piece)
            for read in reads
            for window, part in windows(read.stored.box, read.part, self._itemsize(read.stored), self._limit)
        ]
        for writer in {fetch.writer for fetch in fetches}:
            self._data_start(writer)  # opened here, not by several threads at once
        if num_threads() == 1:
            for run in join_neighbours(fetches, min(JOINED_BYTES, self._limit)):
                self._execute(run)
            return
        with ThreadPoolExecutor(num_threads(), thread_name_prefix="checkpoint-read") as pool:
            running: deque[Future[None]] = deque()
            try:
                for run in join_neighbours(fetches, min(JOINED_BYTES, self._limit)):
                    running.append(pool.submit(self._execute, run))
                    while len(running) > 2 * num_threads():  # errors are seen early, and little is queued
                        running.popleft().result()
                while running:
                    running.popleft().result()
            finally:
                for future in running:
                    future.cancel()

    def verify(self) -> Iterator[tuple[str, int, CheckpointError | None]]:
        """Check every stored box: its shard file, its bytes, and what is wrong with it, if anything."""
        yield from self._missing()
        for position in range(len(self.manifest.writers)):
            try:
                index = self.index(position)
            except CheckpointError as error:
                yield index_name(self.manifest.writers[position].rank), 0, error
                continue
            name = shard_name(self.manifest.writers[position].rank)
            try:
                self._data_start(position)
            except CheckpointError as error:
                yield name, stored_bytes(index.boxes, self.manifest.tensors)[0], error
                continue
            panels = (p for b in index.boxes for p in stored_panels(b, self.manifest.tensors[b.name]))
            for panel in panels:
                for window, part in windows(panel.box, panel.box, self._itemsize(panel), self._limit):
                    nbytes = window.numel * self._itemsize(panel)
                    try:
                        self._execute([self._fetch(position, panel, window, part, None)])
                    except CheckpointError as error:
                        yield name, nbytes, error
                    else:
                        yield name, nbytes, None
            try:
                self._check_header(position)
            except CheckpointError as error:
                yield name, 0, error

    def _missing(self) -> Iterator[tuple[str, int, CheckpointError | None]]:
        """Tensors that the indexes together do not hold exactly once."""
        boxes: dict[str, list[Box]] = {name: [] for name in self.manifest.tensors}
        try:
            for index in self.indexes:
                for stored in index.boxes:
                    boxes[stored.name].append(stored.box)
                for name in index.scalars:
                    boxes[name].append(Box((), ()))
        except CheckpointError:
            return  # said of the index itself
        for name, tensor in self.manifest.tensors.items():
            try:
                check_tiling(name, boxes[name], tensor.shape)
            except LayoutError as error:
                yield MANIFEST, 0, DamagedError(f"{self.manifest.generation}: {error}")

    def _itemsize(self, stored: StoredBox) -> int:
        return self.manifest.tensors[stored.name].itemsize

    def _fetch(self, writer: int, stored: StoredBox, window: Box, part: Box, piece: Piece | None) -> Fetch:
        """The whole blocks around a window of a stored panel."""
        itemsize = self._itemsize(stored)
        nbytes = stored.box.numel * itemsize
        block = block_size(nbytes)
        begin = position_in(stored.box, window) * itemsize
        end = begin + window.numel * itemsize
        start, stop = begin // block * block, min(-(-end // block) * block, nbytes)
        return Fetch(writer, stored, window, part, piece, stored.start + start, stored.start + stop, begin - start)

    def _execute(self, run: Sequence[Fetch]) -> None:
        """Read the bytes of neighbouring fetches with one call; check and copy each."""
        start, stop = run[0].start, max(fetch.stop for fetch in run)
        base = self._data_start(run[0].writer)
        name = f"{self.manifest.generation}/{shard_name(self.manifest.writers[run[0].writer].rank)}"
        (raw,) = self.storage.read_ranges(name, [(base + start, base + stop)])
        data = memoryview(raw)
        for fetch in run:
            blocks = data[fetch.start - start : fetch.stop - start]
            self._check(fetch, blocks, name, base)
            if fetch.piece is not None:
                self._copy(fetch, fetch.piece, blocks)

    def _check(self, fetch: Fetch, blocks: memoryview, name: str, base: int) -> None:
        stored = fetch.stored
        block = block_size(stored.box.numel * self._itemsize(stored))
        first = (fetch.start - stored.start) // block
        found = checksums(blocks, block)
        expected = bytes(self._sums[fetch.writer][stored.sums + SUM * first :][: len(found)])
        if found != expected:
            bad = next(i for i in range(0, len(found), SUM) if found[i : i + SUM] != expected[i : i + SUM]) // SUM
            at = base + fetch.start + bad * block
            raise DamagedError(
                f"{name}: the checksum of bytes {at} to {min(at + block, base + fetch.stop)} does not match; "
                f"they belong to {stored.name}"
            )

    def _copy(self, fetch: Fetch, piece: Piece, blocks: memoryview) -> None:
        window, part = fetch.window, fetch.part
        dtype = DTYPES[self.manifest.tensors[fetch.stored.name].dtype]
        target = self._target(piece)
        if isinstance(target, np.ndarray) and dtype == piece.tensor.dtype and piece.divisor == 1:
            source = np.frombuffer(blocks, target.dtype, window.numel, fetch.begin).reshape(window.size)
            target[part.slices(piece.offset)] = source[part.slices(window.offset)]
            return
        whole = tensor_over(blocks[fetch.begin : fetch.begin + window.numel * dtype.itemsize], dtype)
        source_part = whole.view(window.size)[part.slices(window.offset)]
        local = piece.tensor.detach()
        local[part.slices(piece.offset)].copy_(divided(source_part, piece.divisor, local.dtype))

    def _target(self, piece: Piece) -> torch.Tensor | np.ndarray[Any, Any]:
        """A piece's tensor to copy into; on the CPU as an array of words, which costs less for each small copy."""
        if (known := self._targets.get(id(piece))) is None:
            local = piece.tensor.detach()
            word = _WORDS.get(local.element_size())
            known = local.view(word).numpy() if local.device.type == "cpu" and word else local
            self._targets[id(piece)] = known
        return known

    def _data_start(self, position: int) -> int:
        """Where a shard's data starts, after its size, its header and its checksums have been checked."""
        if position not in self._data_starts:
            start = len(self._header(position))
            writer = self.manifest.writers[position]
            name = f"{self.manifest.generation}/{shard_name(writer.rank)}"
            _, size = stored_bytes(self.index(position).boxes, self.manifest.tensors)
            (sums,) = self.storage.read_ranges(name, [(writer.shard_bytes - size, writer.shard_bytes)])
            checked = bytes(sums)  # a copy stays what was checked
            if digest(checked) != self.index(position).checksums:
                raise DamagedError(f"{name}: the checksums are not those that were committed")
            self._sums[position], self._data_starts[position] = checked, start
        return self._data_starts[position]

    def _header(self, position: int) -> memoryview | bytearray:
        """A shard's header with its length before it, as it was committed."""
        writer = self.manifest.writers[position]
        name = f"{self.manifest.generation}/{shard_name(writer.rank)}"
        if (found_size := self._sizes.get(name)) != writer.shard_bytes:
            found = "is missing" if found_size is None else f"has {found_size} bytes"
            raise DamagedError(f"{name} {found}; {writer.shard_bytes} bytes were committed")
        data, sums = stored_bytes(self.index(position).boxes, self.manifest.tensors)
        if not 8 <= (size := writer.shard_bytes - data - sums) <= HEADER_BYTES or sums > METADATA_BYTES:
            raise DamagedError(f"{name}: the index has boxes of {data} bytes, which the file does not hold")
        (header,) = self.storage.read_ranges(name, [(0, size)])
        if digest(memoryview(header)) != writer.header:
            raise DamagedError(f"{name}: the header is not the one that was committed")
        return header

    def _check_header(self, position: int) -> None:
        """Check that a shard's header says what the index does: other programs read it by the header alone."""
        index = self.index(position)
        header, _ = lay_out([(b.name, b.box) for b in index.boxes], self.manifest.tensors, index.save_id)
        if bytes(self._header(position)) != header:
            name = shard_name(self.manifest.writers[position].rank)
            raise DamagedError(f"{self.manifest.generation}/{name}: the header does not tell what the index does")


# Read with one call: enough for a disk, and little enough that checking and copying find it in the processor's cache.
JOINED_BYTES = 4 * 1024 * 1024

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # that move the bits of any dtype


@dataclass(frozen=True, slots=True)
class Fetch:
    """Whole blocks of a stored box to read and check, and the part of them to copy into a piece, if any."""

    writer: int  # position in the manifest's list of writers
    stored: StoredBox
    window: Box
    part: Box
    piece: Piece | None
    start: int  # bytes start to stop of the shard's data
    stop: int
    begin: int  # of the window, in bytes after start


def join_neighbours(fetches: Iterable[Fetch], limit: int = JOINED_BYTES) -> Iterator[list[Fetch]]:
    """Fetches that touch in a shard file, together up to `limit` bytes: one read call for many small pieces."""
    run: list[Fetch] = []
    end = 0
    for fetch in sorted(fetches, key=lambda f: (f.writer, f.start, f.stop)):
        apart = not run or fetch.writer != run[0].writer or fetch.start > end
        if apart or max(end, fetch.stop) - run[0].start > limit:
            if run:
                yield run
            run, end = [], 0
        run.append(fetch)
        end = max(end, fetch.stop)
    if run:
        yield run


def num_threads() -> int:
    """Count the threads that this process computes with, which is its share of the cores."""
    return min(16, torch.get_num_threads())
