"""Flush a generation from memory to the durable directory: its files, written from where they lie, committed anew."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from checkpointing.committing import commit
from checkpointing.errors import CheckpointError, DamagedError
from checkpointing.format import ABANDONED, COMMIT, Manifest, Writer
from checkpointing.generations import read, read_manifest
from checkpointing.lease import Hold
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import ALONE, Nodes
from checkpointing.small_files import Buffer, make_directories, named, sync_directory
from checkpointing.storage import FileStorage, Storage
from checkpointing.stores import is_path, open_storage

STEP_BYTES = 16 * 1024 * 1024  # written at a time: what a flush that is to stop still waits for
PAGE = 4096
LOOK_S, LOOK_IN_STORE_S = 0.05, 1.0  # between two looks for the other nodes' parts: a store may ask money for each
WAIT_S = 600.0  # while nothing is written of the other nodes' parts of a generation


class DirectStorage(FileStorage):
    """A directory that whole pages of memory are written to without passing through the page cache.

    `rate` in bytes a second is not exceeded where it is given. `check` is called between writes, and stops by raising.
    """

    def __init__(self, root: str | os.PathLike[str], rate: float = 0, check: Callable[[], None] = lambda: None) -> None:
        super().__init__(root)
        self._rate, self._check = rate, check

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        path = self._path(name)
        make_directories(path.parent)
        with named(path):
            descriptor = _open_direct(path)
            try:
                direct = True
                for part in paced(chunks, self._rate, self._check):
                    if direct and not _is_whole_pages(part):  # the end of a file
                        _no_longer_direct(descriptor)
                        direct = False
                    _write_all(descriptor, part)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(path.parent)


class PacedStorage:
    """Another store, written to at `rate` bytes a second at most and with `check` between parts."""

    def __init__(self, store: Storage, rate: float = 0, check: Callable[[], None] = lambda: None) -> None:
        self._store, self._rate, self._check = store, rate, check
        self.read_ranges, self.list = store.read_ranges, store.list
        self.create_if_absent, self.delete = store.create_if_absent, store.delete

    def __str__(self) -> str:
        return str(self._store)

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        self._store.put(name, paced(chunks, self._rate, self._check))


def open_durable(place: str, rate: float, check: Callable[[], None]) -> Storage:
    """The storage of a place that generations are flushed to."""
    if is_path(place):
        return DirectStorage(place, rate, check)
    return PacedStorage(open_storage(place), rate, check)


def paced(chunks: Iterable[Buffer], rate: float, check: Callable[[], None]) -> Iterator[memoryview]:
    """Parts of chunks, `rate` bytes of them a second at most where it is not 0. `check` stops it by raising."""
    for part in _parts(chunks):
        check()
        began = time.monotonic()
        yield part
        if rate and (early := len(part) / rate - (time.monotonic() - began)) > 0:
            time.sleep(early)


def _open_direct(path: Any) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # a filesystem without it, such as a tmpfs
        return os.open(path, flags, 0o644)


def _no_longer_direct(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _is_whole_pages(part: memoryview) -> bool:
    """Whether the kernel takes memory as it lies."""
    return len(part) % PAGE == 0 and np.frombuffer(part, np.uint8).ctypes.data % PAGE == 0


def _parts(chunks: Iterable[Buffer]) -> Iterator[memoryview]:
    """Whole pages, a bounded number at a time, and the rest last."""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        whole = len(view) // PAGE * PAGE
        for start in range(0, whole, STEP_BYTES):
            yield view[start : min(start + STEP_BYTES, whole)]
        if whole < len(view):
            yield view[whole:]


def _write_all(descriptor: int, part: memoryview) -> None:
    while part:
        written = os.write(descriptor, part)
        if written % PAGE and written < len(part):  # the disk is full: the next write says so
            _no_longer_direct(descriptor)
        part = part[written:]


def flush(
    memory: MappedStorage,
    durable: Storage,
    name: str,
    nodes: Nodes = ALONE,
    wait_s: float = WAIT_S,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Make a generation in memory durable; returns the bytes this node wrote. It is committed when this returns.

    Among several nodes each leaves a record of what it wrote beside it, and the first commits when all are there.
    `check` stops it by raising. What the run turns away from meanwhile is not committed, or is marked as that.
    """
    manifest = read_manifest(memory, name)
    written = 0
    with Hold(durable, name, "write"):
        try:
            _check_wanted(memory, durable, name)
            for writer in manifest.writers:
                for file, nbytes in writer.files.items():
                    (data,) = memory.read_ranges(f"{name}/{file}", [(0, nbytes)])
                    durable.put(f"{name}/{file}", [data])
                    written += nbytes
        except BaseException:
            _discard(durable, manifest, [file for writer in manifest.writers for file in writer.files])
            raise
        if nodes.number:
            # From here on the first node may commit, so nothing is taken back: if it does not, all is cleared away.
            _tell(durable, manifest, nodes)
            _wait_for_commit(durable, manifest, wait_s, check)
        else:
            try:
                if nodes.count > 1:
                    _tell(durable, manifest, nodes)
                    manifest = _gather(durable, manifest, nodes, wait_s, check)
                _check_wanted(memory, durable, name)
                commit(durable, manifest, guard=check)
                durable.delete(_listed(durable, manifest, "prepared-"))
            except BaseException:
                _discard(durable, manifest, [file.rpartition("/")[2] for file in _listed(durable, manifest)])
                raise
        if _is_unwanted(memory, name):
            durable.create_if_absent(f"{name}/{ABANDONED}", b"")
    return written


def _is_unwanted(memory: MappedStorage, name: str) -> bool:
    """Whether the run has turned away from it. Looked at before the commit and after it, as the run marks what is in
    memory before it looks for what is durable: whichever comes first, the mark gets there."""
    return f"{name}/{ABANDONED}" in memory.list(f"{name}/")


def _check_wanted(memory: MappedStorage, durable: Storage, name: str) -> None:
    """Raise where the run has turned away from it: marked here, or on the disk by one that came back elsewhere."""
    if _is_unwanted(memory, name) or f"{name}/{ABANDONED}" in durable.list(f"{name}/"):
        raise CheckpointError(f"the run has turned away from {name}")


def _listed(durable: Storage, manifest: Manifest, start: str = "") -> list[str]:
    return list(durable.list(f"{manifest.generation}/{start}"))


def _tell(durable: Storage, manifest: Manifest, nodes: Nodes) -> None:
    mine = {"save_id": manifest.save_id, "writers": [asdict(writer) for writer in manifest.writers]}
    # All of it at once: the first node reads it as soon as it sees its name.
    durable.create_if_absent(f"{manifest.generation}/prepared-{nodes.number:05d}.json", json.dumps(mine).encode())


def _gather(durable: Storage, manifest: Manifest, nodes: Nodes, wait_s: float, check: Callable[[], None]) -> Manifest:
    """The manifest of what all nodes wrote. For the first node."""

    def told() -> list[str]:
        found = _listed(durable, manifest, "prepared-")
        return found if len(found) == nodes.count else []

    why = f"the other nodes wrote nothing of their parts for {wait_s:.0f} s"
    return _together(durable, manifest, _awaited(durable, manifest, told, wait_s, check, why))


def _wait_for_commit(durable: Storage, manifest: Manifest, wait_s: float, check: Callable[[], None]) -> None:
    why = f"nothing was written of it for {wait_s:.0f} s, and the first node did not commit it"
    _awaited(durable, manifest, lambda: _listed(durable, manifest, COMMIT), wait_s, check, why)


def _awaited(
    durable: Storage,
    manifest: Manifest,
    look: Callable[[], list[str]],
    wait_s: float,
    check: Callable[[], None],
    why: str,
) -> list[str]:
    """Wait for what `look` finds, as long as files of the generation come and grow."""
    seen, since = dict[str, int](), time.monotonic()
    while not (found := look()):
        check()
        files, now = durable.list(f"{manifest.generation}/"), time.monotonic()
        if files != seen:
            seen, since = files, now
        elif now - since > wait_s:
            raise CheckpointError(f"{manifest.generation}: {why}")
        time.sleep(LOOK_S if isinstance(durable, FileStorage) else LOOK_IN_STORE_S)
    return found


def _together(durable: Storage, manifest: Manifest, told: list[str]) -> Manifest:
    writers = []
    for file in told:
        record = json.loads(read(durable, file))
        if record["save_id"] != manifest.save_id:
            raise DamagedError(f"{file} is of another save")
        writers += [Writer.of(one) for one in record["writers"]]
    return replace(manifest, writers=sorted(writers, key=lambda writer: writer.rank))


def _discard(durable: Storage, manifest: Manifest, files: list[str]) -> None:
    """Give back the room that a failed flush took, unless it was committed."""
    with suppress(OSError, CheckpointError):
        if not _listed(durable, manifest, COMMIT):
            durable.delete(f"{manifest.generation}/{file}" for file in files)
