"""From memory to the durable directory: the same files, written straight from where they lie, and committed anew."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from checkpointing.codec import encode_manifest
from checkpointing.errors import CheckpointError, DamagedError
from checkpointing.format import COMMIT, MANIFEST, Manifest, digest
from checkpointing.generations import check_files, check_writers, read, read_manifest
from checkpointing.lease import Hold
from checkpointing.memory.mapped import MappedStorage
from checkpointing.storage import Buffer, FileStorage, Storage, make_directories, sync_directory

STEP_BYTES = 16 * 1024 * 1024  # written at a time: what a flush that is to stop still waits for
PAGE = 4096
WAIT_S = 600.0  # for the other nodes' parts of a generation


@dataclass(frozen=True, slots=True)
class Nodes:
    """Which of how many nodes this is: each flushes what its ranks wrote, and the first one commits."""

    number: int = 0
    count: int = 1


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
        descriptor = _open_direct(path)
        try:
            direct = True
            for part in _parts(chunks):
                self._check()
                began = time.monotonic()
                if direct and not _is_whole_pages(part):  # the end of a file
                    _no_longer_direct(descriptor)
                    direct = False
                _write_all(descriptor, part)
                if self._rate and (early := len(part) / self._rate - (time.monotonic() - began)) > 0:
                    time.sleep(early)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(path.parent)


def _open_direct(path: Any) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:  # a filesystem without it, such as a tmpfs
        return os.open(path, flags, 0o644)


def _no_longer_direct(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _is_whole_pages(part: memoryview) -> bool:
    """Whether the kernel takes memory as it lies."""
    return len(part) % PAGE == 0 and np.frombuffer(part, np.uint8).ctypes.data % PAGE == 0


def _parts(chunks: Iterable[Buffer]) -> Iterable[memoryview]:
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
    nodes: Nodes = Nodes(),  # frozen
    wait_s: float = WAIT_S,
) -> int:
    """Make a generation in memory durable; returns the bytes this node wrote. It is committed when this returns.

    Among several nodes each leaves a record of what it wrote beside it, and the first commits when all are there.
    """
    manifest = read_manifest(memory, name)
    written = 0
    with Hold(durable, name, "write"):
        try:
            for writer in manifest.writers:
                for file, nbytes in writer.files.items():
                    (data,) = memory.read_ranges(f"{name}/{file}", [(0, nbytes)])
                    durable.put(f"{name}/{file}", [data])
                    written += nbytes
            if nodes.count > 1:
                manifest = _meet(durable, manifest, nodes, wait_s)
            if nodes.number == 0:
                _commit(durable, manifest)
        except BaseException:
            _discard(durable, manifest)
            raise
    return written


def _commit(durable: Storage, manifest: Manifest) -> None:
    prefix, data = f"{manifest.generation}/", encode_manifest(manifest)
    if f"{prefix}{COMMIT}" in durable.list(prefix):
        return  # by a keeper that died right after it
    check_writers(manifest)
    durable.put(f"{prefix}{MANIFEST}", [data])
    check_files(manifest, {file.removeprefix(prefix): size for file, size in durable.list(prefix).items()})
    durable.create_if_absent(f"{prefix}{COMMIT}", digest(data).encode())
    durable.delete(file for file in durable.list(prefix) if file.startswith(f"{prefix}prepared-"))


def _meet(durable: Storage, manifest: Manifest, nodes: Nodes, wait_s: float) -> Manifest:
    """Tell what this node wrote; on the first node the manifest of what all wrote, on the others once it is there."""
    prefix = f"{manifest.generation}/"
    mine = {"save_id": manifest.save_id, "writers": [asdict(writer) for writer in manifest.writers]}
    durable.put(f"{prefix}prepared-{nodes.number:05d}.json", [json.dumps(mine).encode()])
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        found = durable.list(prefix)
        if nodes.number and f"{prefix}{COMMIT}" in found:
            return manifest
        told = [file for file in found if file.startswith(f"{prefix}prepared-")]
        if nodes.number == 0 and len(told) == nodes.count:
            return _together(durable, manifest, told)
        time.sleep(0.05)
    raise CheckpointError(f"{manifest.generation}: the other nodes did not write their parts within {wait_s:.0f} s")


def _together(durable: Storage, manifest: Manifest, told: list[str]) -> Manifest:
    from checkpointing.commit import as_writer

    writers = []
    for file in told:
        record = json.loads(read(durable, file))
        if record["save_id"] != manifest.save_id:
            raise DamagedError(f"{file} is of another save")
        writers += [as_writer(one) for one in record["writers"]]
    return replace(manifest, writers=sorted(writers, key=lambda writer: writer.rank))


def _discard(durable: Storage, manifest: Manifest) -> None:
    """Give back the room that a failed flush took, unless it was committed."""
    prefix = f"{manifest.generation}/"
    with suppress(OSError, CheckpointError):
        if f"{prefix}{COMMIT}" not in durable.list(prefix):
            durable.delete([*(f"{prefix}{file}" for w in manifest.writers for file in w.files), f"{prefix}{MANIFEST}"])
