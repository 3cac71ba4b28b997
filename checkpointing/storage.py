"""Where generations live: a protocol of five operations, and the filesystem, which implements it.

Nothing above this file knows about paths, and nothing needs a rename, so object stores fit the same protocol.
Names are relative and use `/`, such as `step-00000030-9f3a61c2/manifest.json`.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from checkpointing.errors import DamagedError
from checkpointing.small_files import (
    DRAFT,
    READ_FLAGS,
    Buffer,
    create_file,
    make_directories,
    named,
    retried,
    sync_directory,
    write_all,
)

logger = logging.getLogger("checkpointing")

SMALL_BYTES = 1024 * 1024  # smaller chunks are joined up to this
SYNC_BYTES = 64 * 1024 * 1024  # written between one request to the disk and the next
SETTLED_NS = 2_000_000_000  # after so long a directory's time tells its next change
WRITES_BEHIND = 2  # chunks that wait to be written: bounds the memory of a save

Data = bytearray | memoryview  # writable


class Storage(Protocol):
    """Where generations live. `str()` of one is its place, as `open_storage` takes it."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        """Write a whole object; it is durable when this returns. An object of that name is replaced."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        """The bytes of each (start, stop), the caller's own.

        `NotFoundError` without the object, `DamagedError` where it is shorter, or no file: reading again would not
        help. `UnreadableError` where the storage goes on failing: that says nothing of the object.
        """

    def list(self, prefix: str = "") -> dict[str, int]:
        """Every object whose name starts with `prefix`, with its size in bytes. `OSError` if that cannot be told."""

    def create_if_absent(self, name: str, data: bytes) -> bool:
        """Create an object durably unless one of that name exists; False if it does. Atomic among all writers."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, durably when this returns; absent ones are ignored."""


class FileStorage:
    """Objects as files below one directory, local or on a shared filesystem."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        path = self._path(name)
        make_directories(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, and no pipe
        with named(path):
            descriptor = os.open(path, flags, 0o666)
            try:
                write_behind(descriptor, chunks)
                # Not cut off before: a heartbeat that takes the place of the last one needs no room on a full disk.
                os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(path.parent)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        path = f"{self.root}/{inside(name, str(self.root))}"

        def read() -> list[Data]:  # opened anew each time: a handle may be what is stale
            descriptor = os.open(path, READ_FLAGS)
            try:
                return [_read_range(descriptor, start, stop, path) for start, stop in ranges]
            finally:
                os.close(descriptor)

        return retried(path, read)

    def list(self, prefix: str = "") -> dict[str, int]:
        """List files with their sizes. A failure to list must not pass for empty, or a run would start over."""
        above = inside(prefix, str(self.root)).rpartition("/")[0]
        where = f"{self.root}/{above}" if above else str(self.root)
        return dict(sorted(retried(where, lambda: self._sizes(above, prefix)).items()))

    def _sizes(self, above: str, prefix: str) -> dict[str, int]:
        """The size of every file below `above` whose name starts with `prefix`; no other directory is entered."""
        found: dict[str, int] = {}
        directories = [above]
        while directories:
            directory = directories.pop()
            where = f"{self.root}/{directory}" if directory else str(self.root)
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(where) as entries:
                for entry in entries:
                    name = f"{directory}/{entry.name}" if directory else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if f"{name}/".startswith(prefix) or prefix.startswith(f"{name}/"):
                            directories.append(name)
                    elif name.startswith(prefix) and entry.is_file(follow_symlinks=False):  # no links out
                        with suppress(FileNotFoundError):  # deleted by another process meanwhile
                            found[name] = entry.stat(follow_symlinks=False).st_size
        return found

    def directories(self) -> dict[str, int]:
        """The directories right below, each with a stamp that changes when a file in it comes or goes.

        Whoever remembers what lies in one knows by it that nothing has changed. 0 where it cannot be told, because it
        changed a moment ago: clocks of filesystems are coarse.
        """
        found, now = dict[str, int](), time.time_ns()

        def look() -> None:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        with suppress(FileNotFoundError):  # deleted by another process meanwhile
                            changed = entry.stat(follow_symlinks=False).st_mtime_ns
                            found[entry.name] = changed if changed < now - SETTLED_NS else 0

        retried(self.root, look)
        return found

    def create_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        make_directories(path.parent)
        # A link makes the name and the content appear at once; whoever dies before it leaves a draft and no object.
        draft = path.parent / f"{DRAFT}{secrets.token_hex(8)}"
        try:
            create_file(draft, data)
            created = _link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        if created is None:  # a filesystem without hard links: exclusive, but filled after it appears
            try:
                create_file(path, data)
            except FileExistsError:
                created = False
            else:
                created = True
        if created:
            sync_directory(path.parent)
        return created

    def delete(self, names: Iterable[str]) -> None:
        parents = set()
        for name in names:
            path = self._path(name)
            path.unlink(missing_ok=True)
            parents.add(path.parent)
        for parent in parents:
            if not parent.is_dir():
                continue
            sync_directory(parent)
            if parent != self.root and not any(parent.iterdir()):
                with suppress(OSError):  # somebody else was faster, or has put something there
                    parent.rmdir()
                    sync_directory(parent.parent)

    def _path(self, name: str) -> Path:
        return self.root / inside(name, str(self.root))


def _link(draft: Path, path: Path) -> bool | None:
    """Whether the draft became `path`; None where the filesystem has no hard links."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return os.stat(draft).st_nlink == 2  # NFS may have done it and lost the answer
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            return None
        raise
    return True


def write_behind(descriptor: int, chunks: Iterable[Buffer]) -> None:
    """Write chunks while the next ones are prepared, and have the disk take them meanwhile.

    Copying and hashing, writing, and the disk each go on while the others do; the sync at the end finds little left.
    """
    with ThreadPoolExecutor(1, "checkpoint-write") as writer, ThreadPoolExecutor(1, "checkpoint-sync") as syncer:
        pending: deque[Future[None]] = deque()
        syncing: Future[None] | None = None
        unsynced = 0
        for chunk in _joined(chunks):
            pending.append(writer.submit(write_all, descriptor, chunk))
            unsynced += memoryview(chunk).nbytes
            if len(pending) > WRITES_BEHIND:
                pending.popleft().result()
            if unsynced >= SYNC_BYTES and (syncing is None or syncing.done()):
                if syncing is not None:
                    syncing.result()  # the kernel says once that it lost what was written: later syncs succeed
                syncing, unsynced = syncer.submit(os.fdatasync, descriptor), 0
        while pending:
            pending.popleft().result()
        if syncing is not None:
            syncing.result()


def _joined(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    """Small chunks together, large ones as they are: few and large writes."""
    small = bytearray()
    for chunk in chunks:
        nbytes = memoryview(chunk).nbytes
        large = nbytes > SMALL_BYTES // 4
        if small and (large or len(small) + nbytes > SMALL_BYTES):
            yield bytes(small)
            small.clear()
        if large:
            yield chunk
        else:
            small += chunk
    if small:
        yield bytes(small)


def _read_range(descriptor: int, start: int, stop: int, path: str) -> memoryview:
    data = memoryview(np.empty(stop - start, np.uint8))  # type: ignore[arg-type]  # arrays are buffers; not zeroed first
    position = start
    while position < stop:
        count = os.preadv(descriptor, [data[position - start :]], position)
        if count == 0:
            raise DamagedError(f"{path} ends at byte {position}; bytes up to {stop} were expected")
        position += count
    return data


def inside(name: str, where: str) -> str:
    """The name, unless it leads out of its storage."""
    if name.startswith("/") or ".." in name.split("/"):
        raise DamagedError(f"the name {name!r} leaves the directory {where}; nothing was touched")
    return name
