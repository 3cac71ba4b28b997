"""The meaning of a place that has generations: a run, a directory or store of them, or one of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from checkpointing.errors import NotFoundError
from checkpointing.generations import Generation, check_readable, is_generation, scan
from checkpointing.storage import FileStorage, Storage
from checkpointing.stores import is_path, open_storage

CHECKPOINTS = "checkpoints"  # of a run, where it is not told otherwise


@dataclass(frozen=True, repr=False)
class Place:
    """Generations, and where they lie."""

    storage: Storage
    generations: list[Generation]  # newest first, whatever their state; where one was named that one alone
    named: str | None  # the name of the one generation that the path is

    def __repr__(self) -> str:
        return f"<{len(self.generations)} generations in {self.storage}>"

    @property
    def candidates(self) -> list[Generation]:
        """The committed generations that may be loaded: of one that was named that one, abandoned or not."""
        return [g for g in self.generations if g.committed and (self.named is not None or not g.abandoned)]

    @property
    def newest(self) -> Generation | None:
        """The newest sound one of the candidates. `UnreadableError` where the storage fails: any may be the newest."""
        check_readable(self.candidates)
        return next((g for g in self.candidates if g.sound), None)


def find(path: str | os.PathLike[str] | Storage) -> Place:
    """The generations of a run's directory, of a directory of generations, or of a generation's own; or of a store.

    Links are followed, and so `.` has a name. `NotFoundError` where there is no directory, or no generation in it.
    """
    if not isinstance(path, str | os.PathLike):
        return _in_store(path)
    text = os.fspath(path)
    if text.startswith("file://"):
        path = text.removeprefix("file://")
    elif not is_path(path):
        around, _, name = text.rstrip("/").rpartition("/")
        if is_generation(name) and not is_path(around):
            return _in_store(open_storage(around), name)
        return _in_store(open_storage(path))
    given = Path(path).expanduser()  # as of a quoted `~/run`
    if not given.is_dir():
        raise NotFoundError(f"{path} is not a directory; give a run, a checkpoint directory or a generation")
    directory = (given / CHECKPOINTS if (given / CHECKPOINTS).is_dir() else given).resolve()
    storage = FileStorage(directory)
    if generations := scan(storage):
        return Place(storage, generations, None)
    above = FileStorage(directory.parent)
    if generations := [g for g in scan(above) if g.name == directory.name]:
        return Place(above, generations, directory.name)
    is_run = (given / "config.yaml").is_file()
    elsewhere = "; if it is a run, its config.yaml says where its checkpoints are" if is_run else ""
    raise NotFoundError(f"{directory} holds no generation (directories named step-XXXXXXXX-<save id>){elsewhere}")


def _in_store(storage: Storage, name: str | None = None) -> Place:
    """All generations of a storage, or the one of a name."""
    if generations := [g for g in scan(storage) if name in (None, g.name)]:
        return Place(storage, generations, name)
    raise NotFoundError(f"{storage} holds no generation{f' {name}' if name else ''}")
