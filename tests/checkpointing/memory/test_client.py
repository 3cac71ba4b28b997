"""A rank's side: it starts a keeper where none is, starts another when that dies, and never blocks for one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks.processes import wait_for
from checkpointing.memory import Snapshotter, copying, snapshotter
from tests.checkpointing.memory.keepers import WAIT_S
from tests.checkpointing.memory.test_snapshotter import assert_equal, loaded, rows_of


def test_a_killed_keeper_is_replaced_and_training_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    snapshots = Snapshotter(None, root)
    pids: list[int] = []

    def take(step: int) -> bool:
        snapshots.snapshot(step, rows_of(0, 1, step))
        outcome = snapshots.settle()
        assert outcome is not None
        return bool(outcome.generation)

    assert take(1)
    pids.append(snapshots.keeper_pid)
    os.kill(pids[0], signal.SIGKILL)
    wait_for(lambda: not snapshots._client.connected.is_set())
    assert not take(2)  # told, and not waited for
    found, _ = loaded(root)
    assert_equal(found, rows_of(0, 1, 1))
    wait_for(snapshots._client.connected.is_set, 60)
    assert take(3)
    assert snapshots.keeper_pid != pids[0]
    found, _ = loaded(root)
    assert_equal(found, rows_of(0, 1, 3))
    pid = snapshots.keeper_pid
    snapshots.close(finished=True)
    wait_for(lambda: not root.exists() and not Path(f"/proc/{pid}").exists(), WAIT_S)


def test_a_keeper_that_hangs_costs_one_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (snapshotter, copying):
        monkeypatch.setattr(module, "SETTLE_S", 1.0)
    root = tmp_path / "memory"
    snapshots = Snapshotter(None, root)
    snapshots.snapshot(1, rows_of(0, 1, 1))
    assert (outcome := snapshots.settle()) is not None and outcome.generation
    pid = snapshots.keeper_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        snapshots.snapshot(2, rows_of(0, 1, 2))
        assert (outcome := snapshots.settle()) is not None and outcome.why
        began = time.monotonic()
        for step in range(3, 30):
            snapshots.snapshot(step, rows_of(0, 1, step))
            assert (outcome := snapshots.settle()) is not None and "away" in outcome.why
        assert time.monotonic() - began < 27 / 2  # none of them waited its second
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(snapshots._client.connected.is_set)
    snapshots.snapshot(30, rows_of(0, 1, 30))
    assert (outcome := snapshots.settle()) is not None and outcome.generation
    snapshots.close(finished=True)
    wait_for(lambda: not root.exists() and not Path(f"/proc/{pid}").exists(), WAIT_S)
