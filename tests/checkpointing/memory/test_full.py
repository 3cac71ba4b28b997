"""No room, on filesystems that are really full: what was there before stays, and training goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing import LayoutError, Piece, load
from checkpointing.generations import candidates
from checkpointing.memory import Snapshotter, room
from checkpointing.storage import FileStorage
from tests.checkpointing.memory.keepers import WAIT_S, keeping
from tests.checkpointing.memory.test_snapshotter import assert_equal, rows_of
from tests.conftest import CUT_DOWN

ROWS = 1300  # 3.6 MB
STATE = ROWS * 700 * 4


@pytest.fixture
def small(tmp_path: Path, request: pytest.FixtureRequest, processes: None) -> Iterator[Path]:
    """A tmpfs with room for three snapshots and little more."""
    path = tmp_path / "small"
    path.mkdir()
    size = f"size={3 * STATE + 600_000}"
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", path]).returncode == 0
    if not mounted:
        request.config.stash[CUT_DOWN].append(
            "full filesystems: a tmpfs can be mounted only as root, so that this was not tried"
        )
    yield path
    if mounted:
        subprocess.run(["umount", "-l", path], check=True)


def fill(directory: Path) -> Path:
    """Take all that is left."""
    ballast = directory / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    return ballast


def loaded_rows(directory: Path) -> list[Piece]:
    pieces = rows_of(0, 1, -1, ROWS)
    load(directory, pieces)
    return pieces


def test_a_full_tmpfs_costs_snapshots_and_nothing_else(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.ismount(small):
        return
    monkeypatch.setattr(room, "SPARE_BYTES", 0)
    memory = small / "memory"
    with keeping(memory):
        snapshots = Snapshotter(None, memory)
        for step in range(1, 11):
            if step in (2, 8):  # the second time everything is allocated, and a full tmpfs costs nothing
                ballast = fill(small)
            elif step in (4, 10):
                ballast.unlink()
            snapshots.snapshot(step, rows_of(0, 1, step, ROWS))
            outcome = snapshots.settle()
            assert outcome is not None
            if step in (2, 3):
                assert not outcome.generation and "No space left" in outcome.why
            else:
                assert outcome.generation, outcome
            assert_equal(loaded_rows(memory), rows_of(0, 1, 1 if step in (2, 3) else step, ROWS))
        with pytest.raises(LayoutError, match=r"leaves .* GB of it"):
            snapshots.prepare(rows_of(0, 1, 1, 10 * ROWS))  # another layout that does not fit
        snapshots.close()
    assert_equal(loaded_rows(memory), rows_of(0, 1, 10, ROWS))


def test_a_full_disk_costs_durable_ones_and_nothing_else(small: Path, tmp_path: Path) -> None:
    if not os.path.ismount(small):
        return
    memory, disk = tmp_path / "memory", small / "disk"
    with keeping(memory):
        snapshots = Snapshotter(disk, memory)
        for step in (1, 2, 3, 4, 5):
            snapshots.snapshot(step, rows_of(0, 1, step, ROWS), durable=True)
            outcome = snapshots.settle()
            assert outcome is not None and outcome.generation
            assert snapshots.wait_durable(WAIT_S)
        told = snapshots.durables()
        assert [(one.step, bool(one.generation)) for one in told] == [(n, n <= 3) for n in (1, 2, 3, 4, 5)]
        assert "No space left" in told[3].why
        assert [g.step for g in candidates(FileStorage(disk)) if g.sound] == [3, 2, 1]
        assert sum(1 for _ in disk.glob("step-*/shard-*")) == 3  # what was written of the others is given back
        snapshots.close()
    assert_equal(loaded_rows(disk), rows_of(0, 1, 3, ROWS))
