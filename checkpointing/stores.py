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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from checkpointing.errors import DamagedError, LayoutError, NotFoundError, reason_of
from checkpointing.small_files import Buffer
from checkpointing.storage import Data, FileStorage, Storage, inside

_STORE = re.compile(r"([a-z][a-z0-9_+.-]*)://(.*)", re.DOTALL)


def open_storage(place: str | os.PathLike[str] | Storage) -> Storage:
    """The storage of a place, which need not exist; a storage is its own. `NotFoundError` for a store nobody knows.

    `str()` of what is returned is a place that opens the same again.
    """
    if not isinstance(place, str | os.PathLike):
        return place
    if is_path(place):
        return FileStorage(Path(place).expanduser())
    found = _STORE.fullmatch(os.fspath(place))
    assert found is not None
    if (store := STORES.get(found[1])) is None:
        raise NotFoundError(
            f"{place}: no store is called {found[1]!r}. Known are {', '.join(sorted(STORES))}; one of your own is "
            "known once its file was loaded. A path has no '://' in it."
        )
    return store(found[2])


def is_path(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a directory's path, and not one in a store."""
    return _STORE.fullmatch(os.fspath(place)) is None


def same_place(a: Storage, b: Storage) -> bool:
    """Whether two storages are of one place."""
    if isinstance(a, FileStorage) and isinstance(b, FileStorage):
        return a.root.resolve() == b.root.resolve()
    return a is b or (type(a) is type(b) and str(a) == str(b))


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

    `LayoutError` for a file that is none, and for a name that is taken.
    """
    file, name = file.resolve(), file.stem
    if _files.get(name, file) != file or name in _BUILT_IN:
        raise LayoutError(f"{file}: a store is called {name} already. Rename the file.")
    if not _STORE.fullmatch(f"{name}://"):
        raise LayoutError(f"{file}: the name of a store is in lower case. Rename the file.")
    add_store(name, getattr(module_of(file, f"evershard_store_{name}"), "STORE", None), file)
    return name


def add_store(name: str, store: object, file: Path) -> None:
    """Make a store known that was found in a file. `LayoutError` where it is none."""
    if not callable(store):
        raise LayoutError(f"{file} has no STORE, the class of its storage.")
    STORES[name], _files[name] = store, file


def file_of(place: str) -> Path | None:
    """The file that the store of a place was loaded from; None for a path, and for a store of ours."""
    found = _STORE.fullmatch(place)
    return _files.get(found[1]) if found else None


def module_of(file: Path, name: str) -> object:
    """Import a Python file under a name, once. `LayoutError` where that fails."""
    module = sys.modules.get(name)
    if module is not None and module.__file__ == str(file):
        return module
    specification = importlib.util.spec_from_file_location(name, file)
    if specification is None or specification.loader is None:
        raise LayoutError(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file does
        del sys.modules[name]
        raise LayoutError(f"{file} cannot be imported: {reason_of(error)}. Mend it, or take it out.") from error
    return module
