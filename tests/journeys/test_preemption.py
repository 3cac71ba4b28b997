"""A run that is told to leave: what it has saved, its status, and that it goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import pytest

from launch.supervise import trainers
from tests.harness.processes import wait_for
from tests.harness.runs import SMALL, assert_same_run, events, launched, rows, train

pytestmark = pytest.mark.usefixtures("processes")

RUN = [*SMALL, "train.steps=60", "checkpoint.every=20", "data.log_ids=true", "eval.every=0", "schedule=constant"]


def reach(process: Popen[bytes], run: Path, step: int, log: Path) -> None:
    wait_for(lambda: process.poll() is not None or any(row["step"] >= step for row in rows(run)))
    assert process.poll() is None, log.read_text()


def preempt(run: Path, overrides: Sequence[str], step: int, signum: int, log: Path) -> int:
    """Launch, and signal the launcher after a step; its status."""
    with launched(2, [*overrides, f"run.dir={run}"], log) as process:
        reach(process, run, step, log)
        process.send_signal(signum)
        return process.wait(60)


def test_warned_twice_with_time_it_saves_each_time_and_goes_on(tmp_path: Path) -> None:
    """In the middle between two saves; by SIGTERM and by the warning signal."""
    a, b, log = tmp_path / "a", tmp_path / "b", tmp_path / "log"
    train([*RUN, f"run.dir={a}"])
    assert preempt(b, RUN, 7, signal.SIGTERM, log) == 75, log.read_text()
    first = events(b)[-1]
    assert first[0] == "preempt" and first[1] == rows(b)[-1]["step"] >= 7 and ("commit", first[1]) in events(b)
    assert preempt(b, RUN, 25, signal.SIGUSR1, log) == 75, log.read_text()
    second = events(b)[-1]
    assert second[0] == "preempt" and ("resume", first[1]) in events(b) and ("commit", second[1]) in events(b)
    with launched(2, [*RUN, f"run.dir={b}"], log) as process:
        assert process.wait(120) == 0, log.read_text()
    assert ("resume", second[1]) in events(b)
    assert_same_run(rows(a), rows(b), last=60)
    assert not (b / "metrics.discarded.jsonl").exists()  # nothing was computed twice
    assert "preempted  after step" in log.read_text() and "failed with status" not in log.read_text()


@pytest.mark.parametrize("how", ["grace", "again"])
def test_without_time_what_was_committed_stays(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a save that takes longer than there is time: by the clock, or as the warning comes again."""
    a, b, log = tmp_path / "a", tmp_path / "b", tmp_path / "log"
    train([*RUN, f"run.dir={a}"])
    site = tmp_path / "site"
    site.mkdir()
    # Every save after the first takes a minute.
    (site / "sitecustomize.py").write_text(SLOW_SAVES)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("EVERSHARD_TEST_SLOW", str(tmp_path / "saving"))
    grace = ["elastic.grace_s=2"] if how == "grace" else ["elastic.grace_s=100"]
    with launched(2, [*RUN, *grace, f"run.dir={b}"], log, started=True) as process:  # PYTHONPATH counts
        wait_for(lambda: (tmp_path / "saving").exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if how == "again":
            wait_for(lambda: time.monotonic() - began > 1.5, 10)
            process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 75, log.read_text()
        assert time.monotonic() - began < 30
    said = "2 seconds of grace have passed" if how == "grace" else "SIGTERM came again"
    assert said in log.read_text()
    assert [step for event, step in events(b) if event == "commit"] == [20] and events(b)[-1] == ("preempt", 40)
    monkeypatch.delenv("PYTHONPATH")
    with launched(2, [*RUN, f"run.dir={b}"], log) as process:
        assert process.wait(120) == 0, log.read_text()
    assert ("resume", 20) in events(b)
    assert_same_run(rows(a), rows(b), last=60)


SLOW_SAVES = """
import os, sys, time
if os.environ.get("EVERSHARD_TEST_SLOW") and "RANK" in os.environ:
    import checkpointing.saving
    fsync, count = os.fsync, [0]
    def slow(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if "step-00000040" in name:
            open(os.environ["EVERSHARD_TEST_SLOW"], "w").close()
            time.sleep(60)
        return fsync(descriptor)
    os.fsync = slow
"""


def test_a_warning_before_the_first_step_loses_nothing(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with launched(2, [*RUN, f"run.dir={run}"], log) as process:
        wait_for(lambda: process.poll() is not None or "from scratch" in log.read_text())
        for pid in trainers(process.pid):
            os.kill(pid, signal.SIGUSR1)
        status = process.wait(60)
        assert status == 75, log.read_text()
    assert not rows(run) or ("commit", rows(run)[-1]["step"]) in events(run)
