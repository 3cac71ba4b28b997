"""What a disk may hold after a crash: recorded operations on files, and the states that they may leave behind.

The rules promise no more than POSIX does, and real filesystems keep more than that. The content of a file is durable
once the file was synced, and a name (created, linked, renamed, deleted) once its directory was; a sync covers what had
ended before it began, and counts from its own end. Everything else may be kept or lost, one by one and in any order;
of a write also a part, down to a sector. Pure: nothing here touches a disk, except `Disk.at`, which reads one.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = 0  # the inode of the directory that everything lies below
SECTORS = (512, 4096)  # what a disk writes at once
Kind = Literal["open", "write", "resize", "sync", "link", "rename", "unlink", "mkdir", "rmdir", "returned"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One system call on the directory, or that `save` returned on a rank. Paths are relative to the directory."""

    kind: Kind
    path: str = ""  # "" is the directory itself
    other: str = ""  # the new name of a link or rename
    data: bytes = field(default=b"", repr=False)
    at: int | None = None  # the offset of a write, None where it appends; the size of a resize
    truncate: bool = False  # of an open, which creates what is not there
    rank: int = 0
    began: int = 0  # in ticks of the recorder's clock, the same for all ranks
    ended: int = 0

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.path or ".", self.other, f"{len(self.data)} bytes" if self.data else "")))
        return f"{self.kind} {what} by rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Write:
    inode: int
    at: int
    data: bytes  # may be empty: then the file only grows to `at`, by zeros

    @property
    def touched(self) -> set[int]:
        return {self.inode}


@dataclass(frozen=True, slots=True)
class Resize:
    inode: int
    size: int

    @property
    def touched(self) -> set[int]:
        return {self.inode}


@dataclass(frozen=True, slots=True)
class Names:
    """Names set or removed, all at once: (inode of the directory, name, inode of what it names or None)."""

    entries: tuple[tuple[int, str, int | None], ...]

    @property
    def touched(self) -> set[int]:
        return {directory for directory, _, _ in self.entries}


Change = Write | Resize | Names


@dataclass(frozen=True, slots=True)
class Disk:
    """Directories and contents by inode. What no name leads to is not there."""

    directories: Mapping[int, Mapping[str, int]]
    contents: Mapping[int, bytes]

    @classmethod
    def at(cls, path: Path) -> Disk:
        """What lies below a directory now, taken to be durable."""
        numbers = itertools.count(ROOT + 1)
        inodes = {path: ROOT}
        directories: dict[int, dict[str, int]] = {}
        contents = {}
        for top, subdirectories, files in os.walk(path):
            entries = directories[inodes[Path(top)]] = {}
            for name in subdirectories:
                entries[name] = inodes[Path(top, name)] = next(numbers)
            for name in files:
                entries[name] = number = next(numbers)
                contents[number] = Path(top, name).read_bytes()
        return cls(directories, contents)

    def listing(self) -> dict[str, bytes]:
        """The contents of files by path; a directory as its path and a slash."""
        found: dict[str, bytes] = {}
        todo = [("", ROOT)]
        while todo:
            prefix, directory = todo.pop()
            for name, inode in self.directories[directory].items():
                if inode in self.directories:
                    found[f"{prefix}{name}/"] = b""
                    todo.append((f"{prefix}{name}/", inode))
                else:
                    found[f"{prefix}{name}"] = self.contents[inode]
        return found

    def after(self, changes: Iterable[Change]) -> Disk:
        directories = {inode: dict(entries) for inode, entries in self.directories.items()}
        written: dict[int, bytearray] = {}

        def content(inode: int) -> bytearray:
            if inode not in written:
                written[inode] = bytearray(self.contents[inode])
            return written[inode]

        for change in changes:
            match change:
                case Names(entries):
                    for directory, name, inode in entries:
                        directories[directory].pop(name, None)
                        if inode is not None:
                            directories[directory][name] = inode
                case Resize(inode, size):
                    _grow(content(inode), size)
                    del content(inode)[size:]
                case Write(inode, at, data):
                    file = content(inode)
                    _grow(file, at)
                    file[at : at + len(data)] = data
        return Disk(directories, {**self.contents, **{inode: bytes(data) for inode, data in written.items()}})


def _grow(content: bytearray, size: int) -> None:
    content.extend(bytes(max(0, size - len(content))))


@dataclass(frozen=True, slots=True)
class Effect:
    """What an operation changed, and from the end of which operation on that is durable; None if it never is."""

    position: int
    change: Change
    durable_at: int | None


class History:
    """Operations in the order of their effects, and those effects, beginning from what the disk held."""

    def __init__(self, start: Disk, operations: Iterable[Operation]) -> None:
        # A call may take effect as soon as it began, but a sync is good for nothing before its end.
        order = sorted(operations, key=lambda op: op.ended if op.kind == "sync" else op.began)
        self.operations: tuple[Operation, ...] = tuple(order)
        self._directories = {inode: dict(entries) for inode, entries in start.directories.items()}
        self._new = itertools.count(max([*start.directories, *start.contents]) + 1)
        self._created: set[int] = set()
        self._sizes = {inode: len(content) for inode, content in start.contents.items()}
        self._deleted: dict[str, int] = {}  # by their last path: they may be open and written still
        changes = []
        syncs = []
        for position, operation in enumerate(self.operations):
            if operation.kind == "sync":
                syncs.append((position, operation.began, self._find(operation.path)))
            elif (change := self._change(operation)) is not None:
                self._follow(change)
                changes.append((position, operation.ended, change))
        self.effects = tuple(Effect(at, change, _durable_at(change, ended, syncs)) for at, ended, change in changes)
        made_directories: dict[int, dict[str, int]] = {
            inode: {} for inode in self._directories.keys() - start.directories.keys()
        }
        self.start = Disk(
            {**start.directories, **made_directories}, {**start.contents, **dict.fromkeys(self._created, b"")}
        )

    @property
    def end(self) -> Disk:
        return self.start.after(effect.change for effect in self.effects)

    def _find(self, path: str) -> int:
        inode = ROOT
        for name in filter(None, path.split("/")):
            found = self._directories.get(inode, {}).get(name)
            if found is None and path in self._deleted:
                return self._deleted[path]
            if found is None:
                raise ValueError(f"the recording is not whole or not in order: {path} is used, but was never made")
            inode = found
        return inode

    def _exists(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        return name in self._directories.get(self._find(parent), {})

    def _entry(self, path: str, inode: int | None) -> tuple[int, str, int | None]:
        parent, _, name = path.rpartition("/")
        return self._find(parent), name, inode

    def _change(self, operation: Operation) -> Change | None:
        path = operation.path
        match operation.kind:
            case "open" if self._exists(path):
                return self._resized(self._find(path), 0) if operation.truncate else None
            case "open":
                self._created.add(inode := next(self._new))
                return Names((self._entry(path, inode),))
            case "mkdir":
                self._directories[inode := next(self._new)] = {}
                return Names((self._entry(path, inode),))
            case "write":
                inode = self._find(path)
                # What appends goes where the file ended then, whatever is lost of what was before it.
                at = self._sizes.get(inode, 0) if operation.at is None else operation.at
                self._sizes[inode] = max(self._sizes.get(inode, 0), at + len(operation.data))
                return Write(inode, at, operation.data)
            case "resize":
                assert operation.at is not None, "a size"
                return self._resized(self._find(path), operation.at)
            case "link":
                return Names((self._entry(operation.other, self._find(path)),))
            case "rename":
                return Names((self._entry(path, None), self._entry(operation.other, self._find(path))))
            case "unlink" | "rmdir":
                self._deleted[path] = self._find(path)
                return Names((self._entry(path, None),))
        return None

    def _resized(self, inode: int, size: int) -> Resize:
        self._sizes[inode] = size
        return Resize(inode, size)

    def _follow(self, change: Change) -> None:
        if isinstance(change, Names):
            for directory, name, inode in change.entries:
                self._directories[directory].pop(name, None)
                if inode is not None:
                    self._directories[directory][name] = inode


def _durable_at(change: Change, ended: int, syncs: list[tuple[int, int, int]]) -> int | None:
    """The position of the sync that completes the durability of a change: of every directory that it touched."""
    found = []
    for touched in change.touched:
        first = next((at for at, began, inode in syncs if inode == touched and began >= ended), None)
        if first is None:
            return None
        found.append(first)
    return max(found)


def crash_states(history: History, length: int, samples: int, rng: random.Random) -> Iterator[tuple[str, Disk]]:
    """What may be there if all stops after the first `length` operations, each with a word for how it came about."""
    done = [effect for effect in history.effects if effect.position < length]
    all_of_it = [effect.change for effect in done]
    yield "all is kept, as after a kill", history.start.after(all_of_it)
    open_ = [effect.durable_at is None or effect.durable_at >= length for effect in done]
    if not any(open_):
        return
    changes = list(zip(all_of_it, open_, strict=True))
    yield "all un-synced is lost", history.start.after(change for change, lost in changes if not lost)
    names = (change for change, lost in changes if not lost or isinstance(change, Names))
    yield "un-synced contents are lost", history.start.after(names)
    contents = (change for change, lost in changes if not lost or not isinstance(change, Names))
    yield "un-synced names are lost", history.start.after(contents)
    zeros = (_zeros(change) if lost else change for change, lost in changes)
    yield "un-synced contents are zeros", history.start.after(zeros)
    for number in range(samples):
        kept: list[Change] = []
        share = rng.choice((0.25, 0.5, 0.75, 0.95))
        for change, lost in changes:
            if not lost or rng.random() < share:
                kept += torn(change, rng) if lost and isinstance(change, Write) and rng.random() < 0.5 else [change]
        yield f"sample {number}: a part of what is un-synced is lost", history.start.after(kept)


def _zeros(change: Change) -> Change:
    if not isinstance(change, Write):
        return change
    return Write(change.inode, change.at + len(change.data), b"")


def torn(write: Write, rng: random.Random) -> list[Change]:
    """A write of which only some sectors reached the disk: the first ones, with or without the new size, or any."""
    grain = rng.choice(SECTORS)
    first = -write.at % grain  # sectors are those of the file, wherever the write begins
    cuts = sorted({0, *range(first, len(write.data), grain), len(write.data)})
    parts = list(itertools.pairwise(cuts))
    reached = rng.randint(0, len(parts))
    kind = rng.choice(("cut short", "zeros behind", "holes"))
    if kind == "cut short":
        return [Write(write.inode, write.at, write.data[: cuts[min(reached, len(cuts) - 1)]])]
    parts = parts[:reached] if kind == "zeros behind" else [part for part in parts if rng.random() < 0.5]
    kept: list[Change] = [Write(write.inode, write.at + len(write.data), b"")]
    return kept + [Write(write.inode, write.at + start, write.data[start:stop]) for start, stop in parts]
