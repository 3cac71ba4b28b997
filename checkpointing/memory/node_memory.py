"""The arenas and generations of one node's memory: adopted, taken to be filled, committed and given back.

They are directories, and nothing is known of them that is not on the tmpfs. Only the keeper renames and deletes them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpointing.committing import commit_in_memory, reinstate, withdraw
from checkpointing.format import COMMIT
from checkpointing.generations import scan
from checkpointing.lease import held_generations
from checkpointing.memory.arena import ARENA, arena_name
from checkpointing.storage import FileStorage

_GENERATION = re.compile(r"step-\d+-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Kept:
    """A committed generation."""

    name: str
    serial: int


class NodeMemory:
    """`flushed` names generations that are being written to the disk: like those being read they stay as they are."""

    def __init__(self, root: Path, flushed: Callable[[], set[str]]) -> None:
        self.root, self._flushed = root, flushed
        self._storage = FileStorage(root)
        self.kept: list[Kept] = []  # newest first
        self._common = 0  # the last serial that is known to be committed on all nodes

    def adopt(self, run_id: str | None = None) -> None:
        """Take over what is there: sound generations (of this run) stay, everything else is room."""
        self.kept = []
        for generation in scan(self._storage):
            manifest = generation.manifest
            stranger = manifest is not None and run_id is not None and manifest.run_id != run_id
            if manifest is not None and generation.sound and not generation.abandoned and not stranger:
                self.kept.append(Kept(generation.name, manifest.serial))
            else:
                self._release(generation.name)
        # What a run goes on from is the newest on every node: newer ones were abandoned.
        self._common = self.kept[0].serial if self.kept else 0

    def start(self, run_id: str, arenas: int, everywhere: int, *, anew: bool) -> None:
        """Make ready for another start of the trainer: the two newest generations stay, the others are room.

        `everywhere` is the last serial that this start has committed on all nodes, or 0; with that the newest counts as
        such. With `anew` a process may still write into the files of arenas: they are left to it.
        """
        self.adopt(run_id)
        self._common = everywhere or self._common
        for kept in self.kept[2:]:
            self._release(kept.name)
        while (free := self.free) and len(self._directories) > arenas:
            shutil.rmtree(self.root / arena_name(free[-1]))
        if anew:
            for number in self.free:
                for file in (self.root / arena_name(number)).iterdir():
                    file.unlink()

    @property
    def free(self) -> list[int]:
        """Numbers of arenas, filled or not."""
        matches = (ARENA.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    @property
    def held(self) -> set[str]:
        """Generations that are being read."""
        return held_generations(self._storage)

    @property
    def nbytes(self) -> int:
        """Memory that this run takes on this node."""
        return sum(file.stat().st_blocks * 512 for file in self.root.rglob("shard-*"))

    @property
    def _directories(self) -> list[str]:
        names = (path.name for path in self.root.iterdir())
        return [name for name in names if ARENA.fullmatch(name) or _GENERATION.fullmatch(name)]

    def take(self, everywhere: int, arenas: int, files: Collection[str]) -> str | None:
        """An arena to fill with these shard files; None where none is free. `everywhere` is committed on all nodes."""
        self._common = max(self._common, everywhere)
        if not self.free and len(self._directories) >= arenas and not self._make_room():
            return None
        path = self.root / (arena_name(self.free[0]) if self.free else self._unused())
        path.mkdir(mode=0o700, exist_ok=True)
        for file in path.iterdir():
            if file.name not in files:  # of another layout
                file.unlink()
        return path.name

    def _make_room(self) -> bool:
        """Make an arena of the oldest generation that nobody needs; whether there was one."""
        kept = [one.name for one in reversed(self.kept)]
        common = next((one.name for one in self.kept if one.serial <= self._common), None)
        others = [name for name in self._directories if name not in kept]
        return any(self._release(name) for name in others + kept if name != common)

    def commit(self, arena: str, name: str, serial: int, manifest: bytes, files: Mapping[str, int]) -> None:
        """Make an arena that was filled a generation. Whatever fails, it is an arena again."""
        commit_in_memory(self.root / arena, self.root / name, manifest, files)
        self.kept.insert(0, Kept(name, serial))

    def _release(self, name: str) -> bool:
        """Make a generation an arena again, unless it is in use: COMMIT goes first, so that it never names other bytes.

        A reader takes its hold before it looks for COMMIT: the second look sees every one that found it.
        """
        directory = self.root / name
        if name in self.held | self._flushed():
            return False
        if (directory / COMMIT).exists():
            withdraw(directory)
            if name in self.held:
                reinstate(directory)
                return False
        self.kept = [kept for kept in self.kept if kept.name != name]
        for path in directory.iterdir():
            if not path.name.startswith("shard-"):
                path.unlink()
        directory.rename(self.root / self._unused())
        return True

    def _unused(self) -> str:
        return next(name for n in range(10_000) if not (self.root / (name := arena_name(n))).exists())
