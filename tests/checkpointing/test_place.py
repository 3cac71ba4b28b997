"""What a path means: a run, its generations, or one of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from checkpointing import NotFoundError, Piece, find, load, save
from checkpointing.generations import abandon, scan
from checkpointing.storage import FileStorage
from tests.checkpointing.memory.test_snapshotter import rows_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        tensor = torch.full((2,), float(step))
        save(tmp_path / "run" / "checkpoints", step, [Piece("model/x", tensor, (0,), (2,))])
    return tmp_path / "run"


def test_a_run_its_directory_and_one_generation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, inside = find(run), find(run / "checkpoints")
    assert [g.step for g in whole.generations] == [3, 2, 1] and whole.named is None
    assert str(whole.storage) == str(inside.storage) and whole.newest == whole.candidates[0]
    second = run / "checkpoints" / whole.generations[1].name
    one = find(second)
    assert [g.step for g in one.generations] == [2] and one.named == second.name and one.newest is not None
    os.symlink(second, run.parent / "link")
    assert find(run.parent / "link").named == second.name
    monkeypatch.chdir(second)
    assert find(".").named == second.name
    monkeypatch.setenv("HOME", str(run.parent))
    assert find("~/run").newest == whole.newest  # as a shell leaves it where it is quoted


def test_an_abandoned_one_counts_where_it_is_named(run: Path) -> None:
    storage = FileStorage(run / "checkpoints")
    abandon(storage, [g for g in scan(storage) if g.step == 3])
    place = find(run)
    assert [g.step for g in place.generations] == [3, 2, 1] and [g.step for g in place.candidates] == [2, 1]
    newest = place.newest
    assert newest is not None and newest.step == 2
    assert [g.step for g in find(run / "checkpoints" / place.generations[0].name).candidates] == [3]


def test_what_is_damaged_or_not_committed_is_there_and_is_not_the_newest(run: Path) -> None:
    place = find(run)
    directories = [run / "checkpoints" / g.name for g in place.generations]
    (directories[0] / "COMMIT").unlink()
    max(directories[1].iterdir(), key=lambda path: path.stat().st_size).write_bytes(b"")
    place = find(run)
    assert len(place.generations) == 3 and len(place.candidates) == 2
    newest = place.newest
    assert newest is not None and newest.step == 1


def test_where_there_is_nothing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not a directory; give a run, a checkpoint directory or a generation"):
        find(tmp_path / "nowhere")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(NotFoundError, match="holds no generation"):
        find(run)


def test_what_find_gives_is_loaded(tmp_path: Path) -> None:
    names = [save(tmp_path / "run" / "checkpoints", step, rows_of(0, 1, step), {"at": step}) for step in (1, 2)]
    (tmp_path / "run" / "config.yaml").touch()
    place = find(tmp_path / "run")
    assert load(place, rows_of(0, 1, 0)) == {"at": 2} and repr(place).startswith("<2 generations in ")
    assert load(find(tmp_path / "run" / "checkpoints" / names[0]), rows_of(0, 1, 0)) == {"at": 1}
    with pytest.raises(NotFoundError, match=r"is a run, whose generations are in .*checkpoints, as find\(\) tells"):
        load(tmp_path / "run", rows_of(0, 1, 0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").touch()
    with pytest.raises(NotFoundError, match=r"if it is a run, its config\.yaml says where"):
        find(tmp_path / "other")
