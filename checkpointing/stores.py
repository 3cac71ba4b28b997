"""The storage of a place: a path, or `STORE://REST` of a store that is known by its name.

A store is one class that implements `Storage` and is made of the rest of the place. Somebody else's is known once its
file was loaded; a checkpoint never says where one is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

from checkpointing.errors import (
    CheckpointError,
    DamagedError,
    LayoutError,
    NotFoundError,
    UnreadableError,
    reason_of,
)
from checkpointing.format import digest
from checkpointing.small_files import Buffer
from checkpointing.storage import Data, FileStorage, Storage, inside

Returned = TypeVar("Returned")
_STORE = re.compile(r"([A-Za-z][\w+.-]*)://(.*)", re.DOTALL)
_NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a store


def open_storage(place: str | os.PathLike[str] | Storage) -> Storage:
    """The storage of a place, which need not exist; a storage is its own.

    `NotFoundError` for a store that nobody knows, `LayoutError` where a store does not take the place. `str()` of what
    is returned is a place that opens the same again.
    """
    if not isinstance(place, str | os.PathLike):
        return place
    text = os.fspath(place)
    if (found := _STORE.fullmatch(text)) is None:
        return FileStorage(os.path.expanduser(text) if text == "~" or text.startswith("~/") else text)
    name, rest = found.groups()
    if (store := STORES.get(name)) is None:
        raise NotFoundError(
            f"{place}: no store is called {name!r}. Known are {', '.join(sorted(STORES))}; one of your own is known "
            "once its file was loaded. The path of a directory does not begin with a word and '://'."
        )
    if name in _BUILT_IN:
        return store(rest)
    try:
        made = store(rest)
    except Exception as error:  # whatever somebody's class does
        raise LayoutError(f"{place} cannot be opened: {type(error).__name__}: {error}.") from error
    return made if isinstance(made, FileStorage | MemoryStorage) else ForeignStorage(made)


def is_path(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a directory's path, and not one in a store."""
    return _STORE.fullmatch(os.fspath(place)) is None


class ForeignStorage:
    """Somebody's storage, whose errors are those of the contract: `OSError`, or one of ours.

    Another exception of a write means that it failed; of a read, that the storage failed, and nothing of the object.
    """

    def __init__(self, store: Storage) -> None:
        self.store = store

    def __str__(self) -> str:
        return str(self.store)

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        raised: list[BaseException] = []

        def passed_on() -> Iterator[Buffer]:
            try:
                yield from chunks
            except BaseException as error:  # of whoever writes, such as a flush that is given up
                raised.append(error)
                raise

        try:
            self.store.put(name, passed_on())
        except Exception as error:
            if raised:
                raise raised[0] from None
            self._raise(error, name, OSError)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        return self._of(lambda: self.store.read_ranges(name, ranges), name, UnreadableError)

    def list(self, prefix: str = "") -> dict[str, int]:
        return self._of(lambda: self.store.list(prefix), prefix, UnreadableError)

    def create_if_absent(self, name: str, data: bytes) -> bool:
        return self._of(lambda: self.store.create_if_absent(name, data), name, OSError)

    def delete(self, names: Iterable[str]) -> None:
        self._of(lambda: self.store.delete(names), "", OSError)

    def _of(self, call: Callable[[], Returned], name: str, kind: type[Exception]) -> Returned:
        try:
            return call()
        except Exception as error:
            self._raise(error, name, kind)

    def _raise(self, error: Exception, name: str, kind: type[Exception]) -> NoReturn:
        if isinstance(error, OSError | CheckpointError):
            raise error
        raise kind(f"{self}/{name}: {type(error).__name__}: {error}") from error


def same_place(a: Storage, b: Storage) -> bool:
    """Whether two storages are of one place."""
    if isinstance(a, FileStorage) and isinstance(b, FileStorage):
        return a.root.resolve() == b.root.resolve()
    return a is b or (type(a) is type(b) and str(a).rstrip("/") == str(b).rstrip("/"))


def shared_place(storage: Storage) -> str | None:
    """A place that opens this storage in any process of this machine; None where there is none."""
    if isinstance(storage, FileStorage):
        return str(storage.root.resolve())
    return None if isinstance(storage, MemoryStorage) or is_path(str(storage)) else str(storage)


class MemoryStorage:
    """Objects in this process, for tests and for programs that keep a checkpoint without a disk."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"memory://{self._name}" if self._name else f"memory at {id(self):#x}"

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        data = b"".join(memoryview(chunk).cast("B") for chunk in chunks)
        with self._lock:
            self._objects[inside(name, str(self))] = data

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        data = self._objects.get(inside(name, str(self)))
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
            if inside(name, str(self)) in self._objects:
                return False
            self._objects[name] = bytes(data)
            return True

    def delete(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                self._objects.pop(inside(name, str(self)), None)


_in_memory: dict[str, MemoryStorage] = {}


def _named_memory(name: str) -> MemoryStorage:
    """The one of this name in this process."""
    return _in_memory.setdefault(name, MemoryStorage(name))


STORES: dict[str, Callable[[str], Storage]] = {"file": FileStorage, "memory": _named_memory}
_BUILT_IN = frozenset(STORES)
_files: dict[str, Path] = {}  # of stores that were loaded


def load_store(file: Path) -> str:
    """Make the store in a Python file known by the file's name; returns that name. The file has it as `STORE`.

    A file that has changed since is loaded anew. `LayoutError` for one that is none, or has a name that is none.
    """
    file = file.resolve()
    add_store(file.stem, getattr(module_of(file, f"evershard_store_{file.stem}"), "STORE", None), file)
    return file.stem


def add_store(name: str, store: object, file: Path) -> None:
    """Make a store known that was found in a file. `LayoutError` where it is none, or its name is taken or none."""
    if name in _BUILT_IN:
        raise LayoutError(f"{file}: a store is called {name} already. Rename the file.")
    if not _NAME.fullmatch(name):
        raise LayoutError(f"{file}: the name of a store is a word in lower case. Rename the file.")
    if not callable(store):
        raise LayoutError(f"{file} has no STORE, the class of its storage.")
    STORES[name], _files[name] = store, file


def file_of(place: str) -> Path | None:
    """The file that the store of a place was loaded from; None for a path, and for a store of ours."""
    found = _STORE.fullmatch(place)
    return _files.get(found[1]) if found else None


def module_of(file: Path, name: str) -> ModuleType:
    """Import a Python file under a name, once while its content stays the same. `LayoutError` where that fails."""
    try:
        content = digest(file.read_bytes())
    except OSError as error:
        raise LayoutError(f"{file} cannot be read: {error.strerror}.") from error
    module = sys.modules.get(name)
    if module is not None and (module.__file__, getattr(module, _CONTENT, None)) == (str(file), content):
        return module
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise LayoutError(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    setattr(module, _CONTENT, content)
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does
        del sys.modules[name]
        raise LayoutError(f"{file} cannot be imported: {reason_of(error)}. Mend it, or take it out.") from error
    return module


_CONTENT = "__evershard_content__"  # the digest of the file that a module was made of
