"""Reading generations in memory: files of a tmpfs are mapped rather than copied."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from checkpointing.errors import DamagedError
from checkpointing.small_files import READ_FLAGS, retried
from checkpointing.storage import Data, FileStorage


class MappedStorage(FileStorage):
    """A directory in memory.

    What `read_ranges` gives are parts of a private mapping: the caller's to change, and shared by callers that read
    the same bytes of the same file.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self._maps: dict[tuple[int, int], mmap.mmap] = {}  # by file and size: a file that is written again stays itself
        self._lock = threading.Lock()

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        path = self._path(name)

        def read() -> memoryview:
            descriptor = os.open(path, READ_FLAGS)
            try:
                return self._map(descriptor, path)
            finally:
                os.close(descriptor)

        data = retried(path, read)
        if (end := max((stop for _, stop in ranges), default=0)) > len(data):  # touching it would kill the process
            raise DamagedError(f"{path} ends at byte {len(data)}; bytes up to {end} were expected")
        return [data[start:stop] for start, stop in ranges]

    def _map(self, descriptor: int, path: Path) -> memoryview:
        status = os.fstat(descriptor)
        if status.st_size == 0:
            return memoryview(bytearray())
        key = status.st_ino, status.st_size
        with self._lock:
            if key not in self._maps:
                try:
                    self._maps[key] = mmap.mmap(descriptor, status.st_size, mmap.MAP_PRIVATE)
                except ValueError as error:  # it became shorter meanwhile
                    raise DamagedError(f"{path} cannot be mapped: {error}") from error
            return memoryview(self._maps[key])
