"""Where generations live: a protocol of five operations, and the filesystem as the first that implements it.

Nothing above this file knows about paths, and nothing needs a rename, so object stores fit the same protocol.
Names are relative and use `/`, such as `step-00000030-9f3a61c2/manifest.json`.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from checkpointing.errors import DamagedError, NotFoundError

SMALL_BYTES = 1024 * 1024  # smaller chunks are joined up to this
SYNC_BYTES = 64 * 1024 * 1024  # written between one request to the disk and the next
WRITES_BEHIND = 2  # chunks that wait to be written: bounds the memory of a save

Buffer = bytes | bytearray | memoryview
Data = bytearray | memoryview  # writable


class Storage(Protocol):
    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        """Write a whole object; it is durable when this returns. An object of that name is replaced."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        """The bytes of each (start, stop), the caller's own.

        `NotFoundError` without the object, `DamagedError` where the bytes cannot be had.
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
        with open(path, "wb", buffering=0) as file:
            write_behind(file.fileno(), chunks)
            os.fsync(file.fileno())
        sync_directory(path.parent)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{self.root / name} does not exist") from None
        except OSError as error:
            raise DamagedError(f"{self.root / name} cannot be read: {error.strerror}") from error
        try:
            return [_read_range(descriptor, start, stop, self.root / name) for start, stop in ranges]
        except OSError as error:  # such as EIO of a disk that fails
            raise DamagedError(f"{self.root / name} cannot be read: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def list(self, prefix: str = "") -> dict[str, int]:
        found = {}
        top = self._path(prefix.rpartition("/")[0])  # only the directory that the prefix leads into is walked
        for directory, _, files in os.walk(top, onerror=_absent_is_empty):
            for file in files:
                path = Path(directory, file)
                name = path.relative_to(self.root).as_posix()
                if name.startswith(prefix):
                    try:
                        status = path.lstat()
                    except FileNotFoundError:
                        continue  # deleted by another process between the listing and the look
                    if stat.S_ISREG(status.st_mode):  # no links out of here, and no pipes that never end
                        found[name] = status.st_size
        return dict(sorted(found.items()))

    def create_if_absent(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        make_directories(path.parent)
        # A link makes the name and the content appear at once; whoever dies before it leaves a draft and no object.
        draft = path.parent / f".draft-{secrets.token_hex(8)}"
        try:
            _create(draft, data)
            created = _link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        if created is None:  # a filesystem without hard links: exclusive, but filled after it appears
            try:
                _create(path, data)
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
        return self.root / _inside(name, str(self.root))


def _absent_is_empty(error: OSError) -> None:
    """What cannot be listed must not pass for empty: a run would start over."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _create(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
            pending.append(writer.submit(_write_all, descriptor, chunk))
            unsynced += memoryview(chunk).nbytes
            if len(pending) > WRITES_BEHIND:
                pending.popleft().result()
            if unsynced >= SYNC_BYTES and (syncing is None or syncing.done()):
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


def _write_all(descriptor: int, chunk: Buffer) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read_range(descriptor: int, start: int, stop: int, path: Path) -> memoryview:
    data = memoryview(np.empty(stop - start, np.uint8))  # type: ignore[arg-type]  # arrays are buffers; not zeroed first
    position = start
    while position < stop:
        count = os.preadv(descriptor, [data[position - start :]], position)
        if count == 0:
            raise DamagedError(f"{path} ends at byte {position}; bytes up to {stop} were expected")
        position += count
    return data


def make_directories(path: Path) -> None:
    """Create missing directories and sync each parent, so that a directory is as durable as the file in it."""
    if path.is_dir():
        return
    make_directories(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        return
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class MemoryStorage:
    """Objects in this process, for tests and for programs that keep a checkpoint without a disk."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"memory at {id(self):#x}"

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        data = b"".join(memoryview(chunk).cast("B") for chunk in chunks)
        with self._lock:
            self._objects[_inside(name, str(self))] = data

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        data = self._objects.get(_inside(name, str(self)))
        if data is None:
            raise NotFoundError(f"{name} does not exist in {self}")
        for _, stop in ranges:
            if stop > len(data):
                raise DamagedError(f"{name} ends at byte {len(data)}; bytes up to {stop} were expected")
        return [bytearray(data[start:stop]) for start, stop in ranges]

    def list(self, prefix: str = "") -> dict[str, int]:
        with self._lock:
            return {name: len(data) for name, data in sorted(self._objects.items()) if name.startswith(prefix)}

    def create_if_absent(self, name: str, data: bytes) -> bool:
        with self._lock:
            if _inside(name, str(self)) in self._objects:
                return False
            self._objects[name] = bytes(data)
            return True

    def delete(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self._objects.pop(_inside(name, str(self)), None)


def _inside(name: str, where: str) -> str:
    """The name, unless it leads out of its storage."""
    if name.startswith("/") or ".." in name.split("/"):
        raise DamagedError(f"the name {name!r} leaves the directory {where}; nothing was touched")
    return name
