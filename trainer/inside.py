"""Links in a run's directory that lead out of it: somebody else's run must not make this one write elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from checkpointing.small_files import retried
from trainer.errors import Refused

DEPTH = 2  # of the directories that a run writes into below its own; generations are not entered


def refuse_links(run_dir: Path, checkpoints: Path) -> None:
    """`Refused` where something that the run would write into is a link to a place outside of its directory."""
    for top, depth in ((run_dir, DEPTH), (checkpoints, 1)):
        home = top.resolve()
        for path in _links(home, depth):
            if not _stays(path, home):
                raise Refused(
                    f"{path} is a link to {os.readlink(path)}, and a run writes into its own directory only. Remove "
                    "the link if you know it; for checkpoints elsewhere type checkpoint.dir=DIRECTORY."
                )


def _stays(path: Path, home: Path) -> bool:
    try:
        return path.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # it leads to itself
        return False


def _links(directory: Path, depth: int) -> Iterator[Path]:
    for entry in _entries(directory):
        if entry.is_symlink():
            yield Path(entry.path)
        elif depth > 1 and not entry.name.startswith("step-") and _is_open(entry):
            yield from _links(Path(entry.path), depth - 1)


def _is_open(entry: os.DirEntry[str]) -> bool:
    """A directory to look into: not lost+found, where a run writes nothing."""
    return entry.is_dir(follow_symlinks=False) and os.access(entry.path, os.R_OK | os.X_OK)


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    def look() -> list[os.DirEntry[str]]:
        with os.scandir(directory) as entries:
            return list(entries)

    try:
        return look()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return retried(directory, look)
