"""What stays: the newest few, always the newest one, and nothing of dead saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpointing import Piece, load, save
from checkpointing.generations import abandon, scan
from checkpointing.retention import clear_leftovers, prune
from checkpointing.storage import FileStorage

PIECES = [Piece("model/w", torch.ones(4), (0,), (4,))]


def steps(directory: Path) -> list[int]:
    return [g.step for g in scan(FileStorage(directory))]


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, PIECES)
    assert len(prune(FileStorage(tmp_path), 2)) == 3
    assert steps(tmp_path) == [5, 4]
    assert prune(FileStorage(tmp_path), 2) == []
    prune(FileStorage(tmp_path), 1)
    assert steps(tmp_path) == [5]
    load(tmp_path, PIECES)


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, PIECES)
    with pytest.raises(ValueError, match="at least 1"):
        prune(FileStorage(tmp_path), 0)
    assert steps(tmp_path) == [1]


def test_abandoned_ones_go_once_enough_others_exist(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    save(tmp_path, 9, PIECES)
    abandon(storage, scan(storage))
    save(tmp_path, 5, PIECES, incarnation=1)
    prune(storage, 2)
    assert steps(tmp_path) == [5, 9]
    save(tmp_path, 6, PIECES, incarnation=1)
    prune(storage, 2)
    assert steps(tmp_path) == [6, 5]


def test_leftovers_of_dead_saves_are_cleared_and_generations_are_not(tmp_path: Path) -> None:
    save(tmp_path, 1, PIECES)
    dead = tmp_path / save(tmp_path, 2, PIECES)
    (dead / "COMMIT").unlink()
    damaged = tmp_path / save(tmp_path, 3, PIECES)
    (damaged / "manifest.json").write_text("{}")
    assert clear_leftovers(FileStorage(tmp_path)) == [dead.name]
    assert not dead.exists() and steps(tmp_path) == [1, 3]


def test_a_deletion_cut_short_leaves_no_generation(tmp_path: Path) -> None:
    class Dying(FileStorage):
        def delete(self, names: object) -> None:
            names = list(names)  # type: ignore[call-overload]
            super().delete(names[:1])
            if len(names) > 1:
                raise KeyboardInterrupt

    for step in (1, 2):
        save(tmp_path, step, PIECES)
    with pytest.raises(KeyboardInterrupt):
        prune(Dying(tmp_path), 1)
    assert [(g.step, g.committed) for g in scan(FileStorage(tmp_path))] == [(2, True), (1, False)]


def test_only_what_is_complete_counts(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, PIECES)
    for step in (2, 3):
        next(tmp_path.glob(f"step-{step:08d}-*/shard-*")).unlink()
    assert prune(FileStorage(tmp_path), 2) == prune(FileStorage(tmp_path), 1) == []
    load(tmp_path, PIECES)
    save(tmp_path, 4, PIECES)
    assert [name[:13] for name in prune(FileStorage(tmp_path), 1)] == ["step-00000001"]
