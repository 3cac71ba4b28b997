"""Whether arenas fit: the least of what the tmpfs, the cgroup and the lock limit leave."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from checkpointing.errors import LayoutError

# Of the memory that is left, so much stays for the rest of the machine, or a part of it where there is little.
SPARE_BYTES = 256 * 1024 * 1024
SPARE_PART = 4
SPARE_PART_OF_TMPFS = 32  # which others may hardly use


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that may still be taken, and by whose account."""

    nbytes: int
    by: str

    @staticmethod
    def within(nbytes: int, by: str, part: int = SPARE_PART) -> Room:
        """The part that may be taken of `nbytes` that are free."""
        return Room(nbytes - min(SPARE_BYTES, max(0, nbytes) // part), by)


def find_room(directory: Path, *, pinned: bool = False, cgroups: Path = Path("/sys/fs/cgroup")) -> Room:
    """The least of what may still be taken in a directory of a tmpfs."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    rooms = [Room.within(free, f"the filesystem of {directory}", SPARE_PART_OF_TMPFS)]
    rooms.append(Room.within(_available(), "this machine's memory"))
    rooms += _of_cgroups(cgroups)
    if pinned and (limit := resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]) != resource.RLIM_INFINITY:
        rooms.append(Room(limit, "the limit of locked memory (ulimit -l)"))
    return min(rooms, key=lambda room: room.nbytes)


def check_room(directory: Path, needed: int, arithmetic: str, *, pinned: bool = False) -> None:
    """`LayoutError` with the arithmetic unless so many more bytes fit."""
    room = find_room(directory, pinned=pinned)
    if needed > room.nbytes:
        raise LayoutError(
            f"snapshots in memory need {needed / 1e9:.2f} GB more in {directory} ({arithmetic}), and {room.by} leaves "
            f"{max(0, room.nbytes) / 1e9:.2f} GB of it. Use more nodes or a "
            "directory with more room."
        )


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_cgroups(root: Path) -> list[Room]:
    """Room that the memory limits of this process's cgroup and those above it leave (version 2, and version 1)."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = base / path.lstrip("/")
        for directory in (here, *here.parents):
            if (left := _left(directory, *names)) is not None:
                found.append(Room.within(left, f"the memory limit of {directory}"))
            if directory == base:
                break
    return found


def _left(directory: Path, limit: str, used: str) -> int | None:
    """Bytes left under a limit. Page cache that was not used lately counts as free: the kernel gives it up first."""
    try:
        left = int((directory / limit).read_text()) - int((directory / used).read_text())
    except (OSError, ValueError):
        return None  # no such limit, or "max"
    try:
        counts = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        return left + int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return left
