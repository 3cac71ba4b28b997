"""Files outside of a storage: small ones, durable when written, and documents that somebody else may have written."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from checkpointing.errors import DamagedError, NotFoundError, UnreadableError

logger = logging.getLogger("checkpointing")

DRAFT = ".draft-"  # a small file before it has its name
Buffer = bytes | bytearray | memoryview
Read = TypeVar("Read")


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


def create_file(path: Path, data: bytes) -> None:
    with named(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        except BaseException:
            path.unlink(missing_ok=True)  # it is this call's, and half of it must not pass for the whole
            raise
        finally:
            os.close(descriptor)


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
        create_file(draft, data)
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


def write_all(descriptor: int, chunk: Buffer) -> None:
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]
