"""Arenas: images of a generation's directory in memory, allocated and touched before they are needed.

A directory `arena-<number>` is free or being filled. To commit it is to rename it to the generation's name; to use it
again is to rename it back. Its shard files keep their size and their memory through both, so nothing is allocated.
"""

from __future__ import annotations

import mmap
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from checkpointing.format import shard_name

ARENA = re.compile(r"arena-(\d{1,4})")


def arena_name(number: int) -> str:
    return f"arena-{number}"


class MappedShard:
    """One rank's shard file in an arena, writable memory of `nbytes` bytes that other processes see.

    It is allocated here: `OSError` (ENOSPC) where there is no room, instead of a signal when it is written.
    """

    def __init__(self, arena: Path, rank: int, nbytes: int, *, pinned: bool = False) -> None:
        arena.mkdir(mode=0o700, exist_ok=True)
        path = arena / shard_name(rank)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size != nbytes:
                os.ftruncate(descriptor, 0)  # of another layout
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
            except OSError:
                os.ftruncate(descriptor, 0)  # what it got of it is others' again
                raise
            # Populated: the kernel fills in the page table now, and not one page at a time while it is copied into.
            self._map = mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
            self.identity = os.fstat(descriptor).st_ino
        finally:
            os.close(descriptor)
        self.nbytes = nbytes
        self.bytes = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pinned = pinned and _register(self.tensor)

    def close(self) -> None:
        """Give back the mapping; the file stays."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = False
        del self.tensor, self.bytes


class Shards:
    """One rank's files in all arenas of a directory, each mapped once."""

    def __init__(self, root: Path, rank: int) -> None:
        self._root, self._rank = root, rank
        self._mapped: dict[int, MappedShard] = {}
        self.pinned = torch.cuda.is_available()

    def of(self, arena: str, nbytes: int) -> MappedShard:
        """This rank's file in an arena, of `nbytes` bytes. `OSError` where it does not fit."""
        path = self._root / arena
        try:
            known = self._mapped.get(os.stat(path / shard_name(self._rank)).st_ino)
        except FileNotFoundError:
            known = None
        if known is None or known.nbytes != nbytes:
            self._forget()
            known = MappedShard(path, self._rank, nbytes, pinned=self.pinned)
            self._mapped[known.identity] = known
        return known

    def _forget(self) -> None:
        """Let go of files that are in no directory any more: while they are mapped they take memory."""
        there = set()
        for file in self._root.glob(f"*/{shard_name(self._rank)}"):
            with suppress(FileNotFoundError):
                there.add(file.stat().st_ino)
        for identity in self._mapped.keys() - there:
            self._mapped.pop(identity).close()

    def names(self, count: int) -> list[str]:
        """Arenas that can be filled, where there are `count` directories of arenas and generations in all."""
        there = {path.name for path in self._root.iterdir() if path.is_dir()}
        more = (name for n in range(10_000) if (name := arena_name(n)) not in there)
        return [name for name in there if ARENA.fullmatch(name)] + [next(more) for _ in range(count - len(there))]

    def close(self) -> None:
        for shard in self._mapped.values():
            shard.close()
        self._mapped.clear()


def _register(memory: torch.Tensor) -> bool:
    """Pin memory, so that a GPU copies into it while this process computes."""
    failed = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    if int(failed):
        raise OSError(f"CUDA cannot pin {memory.numel():,} bytes of shared memory (error {int(failed)})")
    return True
