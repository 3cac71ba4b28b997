"""What stays: the newest few, always the newest one, and nothing of dead saves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from checkpointing import Piece, load, retention, save
from checkpointing.generations import abandon, scan
from checkpointing.lease import hold
from checkpointing.retention import Keep, clear_leftovers, prune
from checkpointing.storage import FileStorage

PIECES = [Piece("model/w", torch.ones(4), (0,), (4,))]


def steps(directory: Path) -> list[int]:
    return [g.step for g in scan(FileStorage(directory))]


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, PIECES)
    assert len(prune(FileStorage(tmp_path), Keep(2))) == 3
    assert steps(tmp_path) == [5, 4]
    assert prune(FileStorage(tmp_path), Keep(2)) == []
    prune(FileStorage(tmp_path), Keep(1))
    assert steps(tmp_path) == [5]
    load(tmp_path, PIECES)


def test_one_that_was_cut_short_since_it_was_found_does_not_count(tmp_path: Path) -> None:
    """Its directory has not changed, and yet the sound ones before it must stay."""
    storage = FileStorage(tmp_path)
    names = [save(tmp_path, step, PIECES) for step in (1, 2, 3)]
    for path in tmp_path.glob("step-*"):
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    scan(storage)
    (tmp_path / names[2] / "shard-00000.safetensors").write_bytes(b"cut short")
    os.utime(tmp_path / names[2], ((tmp_path / names[1]).stat().st_mtime,) * 2)
    scan(storage, remembered=True)
    prune(storage, Keep(1))
    assert steps(tmp_path) == [3, 2]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, PIECES)
    with pytest.raises(ValueError, match="last is 1 or more"):
        prune(FileStorage(tmp_path), Keep(0))
    assert steps(tmp_path) == [1]


def test_abandoned_ones_go_once_enough_others_exist(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    save(tmp_path, 9, PIECES)
    abandon(storage, scan(storage))
    save(tmp_path, 5, PIECES, incarnation=1)
    prune(storage, Keep(2))
    assert steps(tmp_path) == [5, 9]
    save(tmp_path, 6, PIECES, incarnation=1)
    prune(storage, Keep(2))
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
        prune(Dying(tmp_path), Keep(1))
    assert [(g.step, g.committed) for g in scan(FileStorage(tmp_path))] == [(2, True), (1, False)]


def test_only_what_is_complete_counts(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, PIECES)
    for step in (2, 3):
        next(tmp_path.glob(f"step-{step:08d}-*/shard-*")).unlink()
    assert prune(FileStorage(tmp_path), Keep(2)) == prune(FileStorage(tmp_path), Keep(1)) == []
    load(tmp_path, PIECES)
    save(tmp_path, 4, PIECES)
    assert [name[:13] for name in prune(FileStorage(tmp_path), Keep(1))] == ["step-00000001"]


def test_every_kth_and_the_best_stay_as_well(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: None, 4: 2.0, 5: 2.0, 6: 9.0, 7: 8.0}
    for step, loss in losses.items():
        save(tmp_path, step, PIECES, metrics={} if loss is None else {"eval_loss": loss})
    kept = {
        Keep(1): {7},
        Keep(2, every=3): {7, 6, 3},
        Keep(1, best=1): {7, 2},
        Keep(1, best=2): {7, 2, 5},  # of equal ones the newer
        Keep(1, best=2, largest=True): {7, 6},
        Keep(1, best=3, metric="other"): {7},
        Keep(1, every=4, best=1): {7, 4, 2},
    }
    current = scan(FileStorage(tmp_path))
    for keep, expected in kept.items():
        assert {g.step for g in current if g.name in keep.chosen(current)} == expected, keep
    prune(FileStorage(tmp_path), Keep(1, every=4, best=1))
    assert sorted(steps(tmp_path)) == [2, 4, 7]
    # As the run goes on they stay, until something better comes.
    save(tmp_path, 8, PIECES, metrics={"eval_loss": 0.5})
    prune(FileStorage(tmp_path), Keep(1, every=4, best=1))
    assert sorted(steps(tmp_path)) == [4, 8]


@pytest.mark.parametrize("bad", [{"last": 0}, {"every": -1}, {"best": -1}])
def test_what_keeps_nothing_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="the newest generation always stays"):
        Keep(**bad)


def test_what_is_being_read_stays_and_goes_later(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    names = [save(tmp_path, step, PIECES) for step in (1, 2, 3)]
    with hold(storage, names[0]):
        assert prune(storage, Keep(1)) == [names[1]]
    assert prune(storage, Keep(1)) == [names[0]]


def test_a_reader_that_comes_while_its_generation_is_being_deleted_keeps_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It found COMMIT after the first look at the holds; then COMMIT goes, and the rest stays until it is done."""
    storage = FileStorage(tmp_path)
    names = [save(tmp_path, step, PIECES) for step in (1, 2)]
    looks = []

    def look(where: FileStorage) -> set[str]:
        looks.append(1)
        return set() if len(looks) == 1 else {names[0]}

    with monkeypatch.context() as patch:
        patch.setattr(retention, "held_generations", look)
        prune(storage, Keep(1))
    left = {path.name for path in (tmp_path / names[0]).iterdir()}
    assert left == {"manifest.json", "index-00000.json", "shard-00000.safetensors"}
    assert clear_leftovers(storage) == [names[0]] and not (tmp_path / names[0]).exists()


def test_a_save_that_is_going_on_is_no_leftover(tmp_path: Path) -> None:
    """Also one that commits between the look at the directory and the look at the holds."""
    storage, cleared = FileStorage(tmp_path), []
    save(tmp_path, 1, PIECES, guard=lambda: cleared.extend(clear_leftovers(storage)))
    assert cleared == [] and len(list(tmp_path.glob("step-*/COMMIT"))) == 1


def test_a_save_that_ends_meanwhile_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save(tmp_path, 1, PIECES)
    commit = tmp_path / name / "COMMIT"
    data = commit.read_bytes()
    commit.unlink()

    def ends(where: FileStorage) -> set[str]:
        commit.write_bytes(data)
        return set()

    monkeypatch.setattr(retention, "held_generations", ends)
    assert clear_leftovers(FileStorage(tmp_path)) == [] and commit.exists()
