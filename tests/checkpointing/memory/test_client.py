"""A rank's side: it starts a keeper where none is, starts another when that dies, and never blocks for one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from checkpointing.generations import candidates, scan
from checkpointing.memory import Snapshotter, copying, snapshotter
from checkpointing.memory.image import copy_part
from checkpointing.retention import clear_leftovers
from checkpointing.storage import FileStorage
from tests.checkpointing.memory.keepers import WAIT_S, answers
from tests.checkpointing.memory.test_snapshotter import assert_equal, loaded, rows_of
from tests.harness.processes import ROOT, wait_for

pytestmark = pytest.mark.usefixtures("processes")


@pytest.mark.parametrize("when", ["idle", "mid-copy", "mid-flush"])
def test_a_killed_keeper_is_replaced_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    root, disk = tmp_path / "memory", FileStorage(tmp_path / "disk")
    go_on = threading.Event()
    go_on.set()

    def copies(*arguments: Any) -> None:
        assert go_on.wait(WAIT_S)
        copy_part(*arguments)

    monkeypatch.setattr(copying, "copy_part", copies)
    snapshots = Snapshotter(disk.root, root, rate=20_000 if when == "mid-flush" else 0)

    def settle() -> bool:
        outcome = snapshots.settle()
        assert outcome is not None
        return bool(outcome.generation)

    snapshots.snapshot(1, rows_of(0, 1, 1), durable=when != "mid-flush")
    assert settle() and snapshots.wait_durable(WAIT_S)
    pid = snapshots.keeper_pid
    if when == "mid-flush":  # it takes seconds, and is begun when its directory is there
        snapshots.snapshot(2, rows_of(0, 1, 2), durable=True)
        assert settle()
        wait_for(lambda: any(not g.committed for g in scan(disk)))
        os.kill(pid, signal.SIGKILL)
        assert snapshots.wait_durable(WAIT_S)
        assert [(one.step, "went away" in one.why) for one in snapshots.durables()] == [(2, True)]
        assert not [g for g in scan(disk) if g.committed]
    else:
        if when == "mid-copy":
            go_on.clear()
            snapshots.snapshot(2, rows_of(0, 1, 2))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not snapshots._keeper.client.connected.is_set())
        go_on.set()
        if when == "idle":
            snapshots.snapshot(2, rows_of(0, 1, 2))
        assert not settle()  # told, and not waited for
    newest = 2 if when == "mid-flush" else 1
    assert_equal(loaded(root)[0], rows_of(0, 1, newest))
    wait_for(snapshots._keeper.client.connected.is_set, 60)
    assert snapshots.keeper_pid != pid
    snapshots.snapshot(3, rows_of(0, 1, 3), durable=True)
    assert settle() and snapshots.wait_durable(WAIT_S)
    assert_equal(loaded(root)[0], rows_of(0, 1, 3))
    assert [g.step for g in candidates(disk)] == ([3] if when == "mid-flush" else [3, 1])
    assert clear_leftovers(disk) == [] or when == "mid-flush"
    assert all(g.committed for g in scan(disk))
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
    wait_for(snapshots._keeper.client.connected.is_set)
    snapshots.snapshot(30, rows_of(0, 1, 30))
    assert (outcome := snapshots.settle()) is not None and outcome.generation
    snapshots.close(finished=True)
    wait_for(lambda: not root.exists() and not Path(f"/proc/{pid}").exists(), WAIT_S)


def test_a_keeper_that_hangs_up_at_once_is_heard_by_a_whole_snapshotter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first word may come before the constructor's next line, and ended the client's thread then."""
    root, early = tmp_path / "memory", []

    class Slow(copying.Copier):
        def __init__(self, *args: Any) -> None:
            early.extend(thread.name for thread in threading.enumerate() if thread.name == "keeper-client")
            super().__init__(*args)

    monkeypatch.setattr(snapshotter, "Copier", Slow)
    snapshots = Snapshotter(None, root)
    assert early == []
    snapshots.close(finished=True)
    wait_for(lambda: not root.exists(), WAIT_S)


OLDER = """
import sys
from pathlib import Path
from checkpointing.memory import keeper, messages, protocol
from checkpointing.memory.directory import RELEASE

keeper.VERSION = messages.VERSION = protocol.VERSION = 0
keeper.RELEASE = sys.argv[2]  # the first release did not say
keeper.main([sys.argv[1]])
"""


@pytest.mark.parametrize("says", ["keeper.version", "nothing"])
def test_a_keeper_of_another_release_is_replaced_at_once(says: str, tmp_path: Path) -> None:
    root = tmp_path / "memory"
    older = subprocess.Popen([sys.executable, "-c", OLDER, str(root), says], cwd=ROOT)
    wait_for(lambda: answers(root), 60)
    snapshots = Snapshotter(None, root)
    assert older.wait(WAIT_S) == -signal.SIGKILL and snapshots.keeper_pid not in (0, older.pid)
    snapshots.snapshot(1, rows_of(0, 1, 1))
    assert (outcome := snapshots.settle()) is not None and outcome.generation
    snapshots.close(finished=True)
    wait_for(lambda: not root.exists(), WAIT_S)
