"""Which run a directory is: one that was copied, moved or renamed is another run, and shares nothing with the first.

The record lies in the run directory, and says where that directory was when it was written. Rank 0 only.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpointing import DamagedError, NotFoundError
from checkpointing.small_files import read_small, replace_file

NAME = ".identity.json"


@dataclass(frozen=True)
class Identity:
    """`run_id` is what trackers know the run by, and what its generations are marked with."""

    directory: str
    inode: int
    run_id: str


def recorded(run_dir: Path) -> Identity | None:
    """The identity that a directory records; None where there is none, as before the first start."""
    try:
        found = json.loads(read_small(run_dir / NAME))
        return Identity(str(found["directory"]), int(found["inode"]), str(found["run_id"]))
    except (NotFoundError, DamagedError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def came_from(run_dir: Path) -> str:
    """Where the run was that this directory is a copy of, or was moved from; empty where it is that run."""
    found = recorded(run_dir)
    here = _here(run_dir, "")
    return "" if found is None or (found.directory, found.inode) == (here.directory, here.inode) else found.directory


def identify(run_dir: Path, known: str | None) -> str:
    """The run's id, `known` or a new one, recorded in its directory."""
    run_id = known or uuid.uuid4().hex[:8]
    if (found := _here(run_dir, run_id)) != recorded(run_dir):
        replace_file(run_dir / NAME, json.dumps(asdict(found)).encode())
    return run_id


def _here(run_dir: Path, run_id: str) -> Identity:
    return Identity(str(run_dir.resolve()), run_dir.stat().st_ino, run_id)
