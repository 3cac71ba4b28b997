"""Finding generations: order, state, and what does not belong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from checkpointing import Piece, save
from checkpointing.generations import abandon, candidates, newest, scan
from checkpointing.storage import Data, FileStorage

PIECES = [Piece("model/w", torch.ones(4), (0,), (4,))]


def test_newest_first_by_incarnation_then_step(tmp_path: Path) -> None:
    for step, incarnation in ((5, 1), (9, 1), (7, 2), (3, 0)):
        save(tmp_path, step, PIECES, incarnation=incarnation)
    assert [g.step for g in scan(FileStorage(tmp_path))] == [7, 9, 5, 3]


def test_other_files_and_directories_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1, PIECES)
    for name in ("step-1-abc/x", "notes.txt", "step-00000002-zzzzzzzz/COMMIT", "deep/step-00000003-00000000/COMMIT"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("")
    assert [g.step for g in scan(FileStorage(tmp_path))] == [1]


def test_uncommitted_damaged_and_abandoned_are_told_apart(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    names = {step: save(tmp_path, step, PIECES) for step in (1, 2, 3, 4)}
    (tmp_path / names[2] / "COMMIT").unlink()
    (tmp_path / names[3] / "manifest.json").write_text("{}")
    abandon(storage, [g for g in scan(storage) if g.step == 4])
    states = {g.step: (g.committed, g.damage is not None, g.abandoned) for g in scan(storage)}
    assert states == {
        1: (True, False, False),
        2: (False, False, False),
        3: (True, True, False),
        4: (True, False, True),
    }
    assert [g.step for g in candidates(storage)] == [1, 3]
    found = newest(storage)
    assert found is not None and found.step == 1


def test_a_generation_under_another_name_is_damaged(tmp_path: Path) -> None:
    name = save(tmp_path, 1, PIECES)
    (tmp_path / name).rename(tmp_path / "step-00000009-00000000")
    (found,) = scan(FileStorage(tmp_path))
    assert "belongs to step-00000001" in str(found.damage)


def test_an_empty_or_absent_directory_holds_nothing(tmp_path: Path) -> None:
    assert scan(FileStorage(tmp_path)) == scan(FileStorage(tmp_path / "absent")) == []
    assert newest(FileStorage(tmp_path)) is None


def test_a_generation_with_a_file_missing_or_cut_is_damaged(tmp_path: Path) -> None:
    names = [save(tmp_path, step, PIECES) for step in (1, 2, 3)]
    (tmp_path / names[0] / "index-00000.json").unlink()
    shard = tmp_path / names[1] / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = {g.step: str(g.damage or "") for g in scan(FileStorage(tmp_path))}
    assert "index-00000.json is missing" in found[1] and "has 4119 bytes; 4120 bytes were committed" in found[2]
    assert found[3] == ""


def test_marking_cut_short_leaves_the_newest_chosen(tmp_path: Path) -> None:
    class Dying(FileStorage):
        def create_if_absent(self, name: str, data: bytes) -> bool:
            if len(list(tmp_path.glob("*/ABANDONED"))) == 1:
                raise KeyboardInterrupt
            return super().create_if_absent(name, data)

    for step in (1, 2, 3):
        save(tmp_path, step, PIECES)
    with pytest.raises(KeyboardInterrupt):
        abandon(Dying(tmp_path), candidates(FileStorage(tmp_path)))
    assert [g.step for g in candidates(FileStorage(tmp_path))] == [3, 2]


class Counted(FileStorage):
    """Which generations are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Data]:
        self.read.append(name.partition("/")[0])
        return super().read_ranges(name, ranges)


def settle(directory: Path) -> None:
    """As if nothing had changed for a while."""
    for path in directory.glob("step-*"):
        os.utime(path, (path.stat().st_mtime - 60,) * 2)


def test_what_was_found_sound_and_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    names = [save(tmp_path, step, PIECES) for step in (1, 2, 3)]
    settle(tmp_path)
    storage = Counted(tmp_path)
    first = scan(storage)
    storage.read.clear()
    again = scan(storage, remembered=True)
    assert storage.read == [] and all(g.manifest is not None and not g.manifest.tensors for g in again)
    assert [(g.name, g.order, g.files, g.sound) for g in again] == [(g.name, g.order, g.files, g.sound) for g in first]
    assert scan(storage) == first and set(storage.read) == set(names)  # whoever does not ask for it sees what is there
    storage.read.clear()
    abandon(storage, first[1:2])
    found = scan(storage, remembered=True)
    assert set(storage.read) == {names[1]} and [g.abandoned for g in found] == [False, True, False]
    (tmp_path / names[0] / "COMMIT").unlink()
    assert [g.committed for g in scan(storage, remembered=True)] == [True, True, False]
    storage.delete(f"{names[2]}/{file}" for file in first[0].files)
    later = save(tmp_path, 4, PIECES)
    assert [g.name for g in scan(storage, remembered=True)] == [later, names[1], names[0]]


def test_what_changed_a_moment_ago_is_read_again(tmp_path: Path) -> None:
    """A filesystem's clock may not have moved between a look and the change after it."""
    name = save(tmp_path, 1, PIECES)
    storage = Counted(tmp_path)
    scan(storage)
    storage.read.clear()
    scan(storage, remembered=True)
    assert set(storage.read) == {name}


def test_what_is_damaged_or_cannot_be_read_is_not_remembered(tmp_path: Path) -> None:
    name = save(tmp_path, 1, PIECES)
    sound = (tmp_path / name / "manifest.json").read_bytes()
    (tmp_path / name / "manifest.json").write_bytes(b"x" * len(sound))
    settle(tmp_path)
    assert scan(FileStorage(tmp_path))[0].damage is not None
    (tmp_path / name / "manifest.json").write_bytes(sound)
    assert scan(FileStorage(tmp_path), remembered=True)[0].sound
