"""What `FileStorage` does to files, recorded inside this process: a replay needs no strace then.

Only the functions that `FileStorage` uses are seen; a campaign notices if something else changed the directory.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crash_model import Disk, Operation
from benchmarks.crash_ranks import NEW, OLD, WITHOUT_SYNC, Recording, save_step, without_sync
from checkpointing import storage
from checkpointing.collective import Team
from tests.harness.threads import ThreadTeam, all_of, on_ranks


class Recorder:
    """Operations below a directory, while `recording()` lasts."""

    def __init__(self, root: Path) -> None:
        self.operations: list[Operation] = []
        self._root = root.resolve()
        self._clock = itertools.count(1)

    def returned(self, rank: int) -> None:
        self.operations.append(Operation("returned", rank=rank, began=next(self._clock), ended=next(self._clock)))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, describe in {
                "open": self._open,
                "write": self._write,
                "fsync": lambda descriptor: {"kind": "sync", "path": _path_of(descriptor)},
                "fdatasync": lambda descriptor: {"kind": "sync", "path": _path_of(descriptor)},
                "link": lambda source, target: {"kind": "link", "path": source, "other": target},
                "rename": lambda source, target: {"kind": "rename", "path": source, "other": target},
                "replace": lambda source, target: {"kind": "rename", "path": source, "other": target},
                "unlink": lambda path: {"kind": "unlink", "path": path},
                "mkdir": lambda path, *_: {"kind": "mkdir", "path": path},
                "rmdir": lambda path: {"kind": "rmdir", "path": path},
            }.items():
                original = getattr(os, name)
                watched = functools.partial(self._watched, original, describe)
                patch.setattr(os, name, watched)
                accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps the functions there
                if getattr(accessor, name, None) is original:
                    patch.setattr(accessor, name, watched)
            opened = functools.partial(self._watched, builtins.open, self._open_by_mode)
            patch.setattr(storage, "open", opened, raising=False)
            yield

    def _watched(self, original: Callable[..., Any], describe: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        fields = describe(*arguments)
        began = next(self._clock)
        result = original(*arguments, **more)
        if fields and (path := self._inside(fields.pop("path"))) is not None:
            other = self._inside(fields.pop("other", self._root))
            assert other is not None, "a file that leaves the directory"
            if "data" in fields:
                fields["data"] = fields["data"][:result]
            ended = next(self._clock)
            self.operations.append(Operation(path=path, other=other, began=began, ended=ended, **fields))
        return result

    def _inside(self, path: str | Path) -> str | None:
        absolute = Path(os.path.abspath(path))
        return "/".join(absolute.relative_to(self._root).parts) if absolute.is_relative_to(self._root) else None

    def _open(self, path: str | Path, flags: int, *_: Any) -> dict[str, Any] | None:
        truncate = bool(flags & os.O_TRUNC)
        return {"kind": "open", "path": path, "truncate": truncate} if truncate or flags & os.O_CREAT else None

    def _open_by_mode(self, path: str | Path, mode: str = "r") -> dict[str, Any] | None:
        return {"kind": "open", "path": path, "truncate": True} if "w" in mode else None

    def _write(self, descriptor: int, data: Any) -> dict[str, Any] | None:
        path = _path_of(descriptor)
        if self._inside(path) is None:
            return None  # a pipe has no position
        return {"kind": "write", "path": path, "data": bytes(data), "at": os.lseek(descriptor, 0, os.SEEK_CUR)}


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")


def record_here(top: Path, num_ranks: int, case: str) -> Recording:
    """As `benchmarks.crash_ranks.record`, with threads as ranks."""
    directory = top / case
    save_step(OLD, directory, Team())
    start, recorder = Disk.at(directory), Recorder(directory)

    def work(team: ThreadTeam) -> None:
        save_step(NEW, directory, team, case)
        recorder.returned(team.rank)

    with recorder.recording(), without_sync() if case == WITHOUT_SYNC else contextlib.nullcontext():
        all_of(on_ranks(num_ranks, work))
    return Recording(start, recorder.operations, Disk.at(directory), num_ranks)
