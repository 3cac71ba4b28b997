"""Where generations live: a protocol of five operations, and the filesystem as the first that implements it.

Nothing above this file knows about paths, and nothing needs a rename, so object stores fit the same protocol.
Names are relative and use `/`, such as `step-00000030-9f3a61c2/manifest.json`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np

from checkpointing.errors import DamagedError, NotFoundError, UnreadableError

logger = logging.getLogger("checkpointing")

SMALL_BYTES = 1024 * 1024  # smaller chunks are joined up to this
SYNC_BYTES = 64 * 1024 * 1024  # written between one request to the disk and the next
DRAFT = ".draft-"  # a small file before it has its name
SETTLED_NS = 2_000_000_000  # after so long a directory's time tells its next change
WRITES_BEHIND = 2  # chunks that wait to be written: bounds the memory of a save

Buffer = bytes | bytearray | memoryview
Data = bytearray | memoryview  # writable
Read = TypeVar("Read")


class Storage(Protocol):
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
        path = f"{self.root}/{_inside(name, str(self.root))}"

        def read() -> list[Data]:  # opened anew each time: a handle may be what is stale
            descriptor = os.open(path, READ_FLAGS)
            try:
                return [_read_range(descriptor, start, stop, path) for start, stop in ranges]
            finally:
                os.close(descriptor)

        return retried(path, read)

    def list(self, prefix: str = "") -> dict[str, int]:
        """List files with their sizes. A failure to list must not pass for empty, or a run would start over."""
        above = _inside(prefix, str(self.root)).rpartition("/")[0]
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


READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
RETRY_S = (0.05, 0.5, 2.0, 5.0)  # waits before what cannot be read is tried again: a server takes seconds to fail over
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV, errno.ESPIPE}  # a link, a directory, a socket, a pipe
_FOR_GOOD = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}


def retried(path: Path | str, read: Callable[[], Read]) -> Read:
    """Call `read`, again where the storage fails, which an OSError of it says.

    `NotFoundError` without the file, `DamagedError` where something else lies there, `UnreadableError` in the end.
    """
    for wait in (*RETRY_S, None):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{path} does not exist") from None
        except OSError as error:
            if error.errno in _NO_FILE:
                raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
            if wait is None or error.errno in _FOR_GOOD:
                raise UnreadableError(f"{path} cannot be read: {error.strerror}") from error
            logger.warning("%s cannot be read: %s; it is tried again in %s s", path, error.strerror, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _create(path: Path, data: bytes) -> None:
    with named(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        except BaseException:
            path.unlink(missing_ok=True)  # it is this call's, and half of it must not pass for the whole
            raise
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


def _write_all(descriptor: int, chunk: Buffer) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read_range(descriptor: int, start: int, stop: int, path: str) -> memoryview:
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


SMALL_FILE_BYTES = 64 * 1024


def open_file(path: Path) -> BinaryIO:
    """A file to be read. `OSError` for a link, which may lead anywhere, and for a pipe, which may never end."""
    descriptor = os.open(path, READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_small(path: Path) -> bytes:
    """A small file, whole. `NotFoundError` without it, `DamagedError` for a link or more than is ever written."""

    def read() -> bytes:
        with open_file(path) as file:
            return file.read(SMALL_FILE_BYTES + 1)

    data = retried(path, read)
    if len(data) > SMALL_FILE_BYTES:
        raise DamagedError(f"{path} has more than {SMALL_FILE_BYTES:,} bytes, and is not what its name says")
    return data


DOCUMENT_BYTES = 64 * 1024 * 1024


def read_text(path: Path) -> str:
    """A document that somebody else may have written, also behind a link.

    `OSError` for what is no file, such as a pipe, and for what is too large for a document; `ValueError` for bytes that
    are no text.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.ENXIO, "not a file", str(path))
        if about.st_size > DOCUMENT_BYTES:
            raise OSError(errno.EFBIG, "too large for what it should be", str(path))
        return file.read(DOCUMENT_BYTES).decode("utf-8")


def read_json(path: Path) -> Any:
    """Parse what `read_text` gives; `ValueError` where it is no JSON, or too deep."""
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is too deep") from error


def read_object(path: Path) -> dict[str, Any]:
    """A document that is one JSON object. `DamagedError` where it is not."""
    try:
        found = read_json(path)
    except ValueError as error:
        raise DamagedError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} is no JSON object")
    return found


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file, durable when this returns. At any moment it holds all of the old content, or of the new."""
    draft = path.parent / f"{DRAFT}{secrets.token_hex(8)}"
    try:
        _create(draft, data)
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    with named(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of calls on a descriptor do not say of which file: whoever reads them asks that first."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


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
