"""Read planned parts of stored boxes, verify the checksums of every block touched, and copy them into place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from checkpointing.errors import CheckpointError, DamagedError
from checkpointing.format import (
    DTYPES,
    Index,
    Manifest,
    StoredBox,
    block_size,
    checksums,
    digest,
    shard_name,
    stored_panels,
    tensor_over,
)
from checkpointing.generations import read_index
from checkpointing.geometry import Box, Piece
from checkpointing.plan import Read, Stored, position_in, stored_by_name, windows
from checkpointing.storage import Storage


class GenerationReader:
    """One committed generation, opened: its manifest and every index, verified; shard files are read on demand."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self.indexes: list[Index] = [read_index(storage, manifest, i) for i in range(len(manifest.writers))]
        self.stored: Stored = stored_by_name(self.indexes)
        self._sizes = storage.list(f"{manifest.generation}/")
        self._data_starts: dict[int, int] = {}
        self._targets: dict[int, torch.Tensor | np.ndarray[Any, Any]] = {}  # by id of the piece, while it is filled

    @property
    def objects(self) -> dict[str, object]:
        return self.indexes[0].objects

    @property
    def scalars(self) -> dict[str, str]:
        return {name: value for index in self.indexes for name, value in index.scalars.items()}

    def fill(self, reads: Iterable[Read]) -> None:
        """Copy every planned part into its piece, in place. Several threads read, check and copy at a time."""
        self._targets.clear()
        fetches = [
            self._fetch(read.writer, read.stored, window, part, read.piece)
            for read in reads
            for window, part in windows(read.stored.box, read.part, self._itemsize(read.stored))
        ]
        for writer in {fetch.writer for fetch in fetches}:
            self._data_start(writer)  # opened here, not by several threads at once
        if num_threads() == 1:
            for run in join_neighbours(fetches):
                self._execute(run)
            return
        with ThreadPoolExecutor(num_threads(), thread_name_prefix="checkpoint-read") as pool:
            running: deque[Future[None]] = deque()
            try:
                for run in join_neighbours(fetches):
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
        for position, index in enumerate(self.indexes):
            name = shard_name(self.manifest.writers[position].rank)
            panels = (p for b in index.boxes for p in stored_panels(b, self.manifest.tensors[b.name]))
            for panel in panels:
                for window, part in windows(panel.box, panel.box, self._itemsize(panel)):
                    nbytes = window.numel * self._itemsize(panel)
                    try:
                        self._execute([self._fetch(position, panel, window, part, None)])
                    except CheckpointError as error:
                        yield name, nbytes, error
                    else:
                        yield name, nbytes, None
            try:
                self._data_start(position)  # also of a shard without boxes
            except CheckpointError as error:
                yield name, 0, error

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
        expected = stored.checksums[16 * first :][: len(found)]
        if found != expected:
            bad = next(i for i in range(0, len(found), 16) if found[i : i + 16] != expected[i : i + 16]) // 16
            at = base + fetch.start + bad * block
            raise DamagedError(
                f"{name}: the checksum of bytes {at} to {min(at + block, base + fetch.stop)} does not match; "
                f"they belong to {stored.name}"
            )

    def _copy(self, fetch: Fetch, piece: Piece, blocks: memoryview) -> None:
        window, part = fetch.window, fetch.part
        target = self._target(piece)
        if isinstance(target, np.ndarray):
            source = np.frombuffer(blocks, target.dtype, window.numel, fetch.begin).reshape(window.size)
            target[part.slices(piece.offset)] = source[part.slices(window.offset)]
            return
        dtype = DTYPES[self.manifest.tensors[fetch.stored.name].dtype]
        whole = tensor_over(blocks[fetch.begin : fetch.begin + window.numel * dtype.itemsize], dtype)
        target[part.slices(piece.offset)].copy_(whole.view(window.size)[part.slices(window.offset)])

    def _target(self, piece: Piece) -> torch.Tensor | np.ndarray[Any, Any]:
        """A piece's tensor to copy into; on the CPU as an array of words, which costs less for each small copy."""
        if (known := self._targets.get(id(piece))) is None:
            local = piece.tensor.detach()
            word = _WORDS.get(local.element_size())
            known = local.view(word).numpy() if local.device.type == "cpu" and word else local
            self._targets[id(piece)] = known
        return known

    def _data_start(self, position: int) -> int:
        """Where a shard's data starts, after its size and its header have been checked."""
        if position not in self._data_starts:
            writer = self.manifest.writers[position]
            name = f"{self.manifest.generation}/{shard_name(writer.rank)}"
            if (size := self._sizes.get(name)) != writer.shard_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DamagedError(f"{name} {found}; {writer.shard_bytes} bytes were committed")
            itemsize = {stored_name: t.itemsize for stored_name, t in self.manifest.tensors.items()}
            data = sum(b.box.numel * itemsize[b.name] for b in self.indexes[position].boxes)
            (header,) = self.storage.read_ranges(name, [(0, writer.shard_bytes - data)])
            if digest(memoryview(header)) != writer.header:
                raise DamagedError(f"{name}: the header is not the one that was committed")
            self._data_starts[position] = writer.shard_bytes - data
        return self._data_starts[position]


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
    """As many as this process computes with, which is its share of the cores."""
    return min(16, torch.get_num_threads())
