"""Signals reach trainers that another program has started, and the status is what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import supervise as module
from launch.supervise import _status, say_how, supervise, trainers
from tests.harness.processes import alive, wait_for
from trainer.outcome import DIRECTORY, Outcome

# In the trainer's place: it waits for a signal, and says how it ended.
STAND_IN = """
import json, os, pathlib, signal, sys, time
def end(number, frame):
    pathlib.Path(os.environ["EVERSHARD_OUTCOME"], "rank-0.json").write_text(json.dumps(
        {"status": 75, "final": False, "why": signal.Signals(number).name, "rank": 0}))
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end if len(sys.argv) < 2 else signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "__main__.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(module, "TRAINER", path)
    return path


def launcher(words: list[str], after: int) -> int:
    """A program that starts a trainer, and says 1 whatever becomes of it."""
    script = f"import subprocess; subprocess.run({words!r}); raise SystemExit({after})"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        return process.wait(60)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_trainer_and_its_status_comes_back(stand_in: Path, signum: int) -> None:
    def warn() -> None:
        wait_for(lambda: bool(trainers()), 30)
        (found,) = trainers()
        wait_for(lambda: handles(found), 30)
        os.kill(os.getpid(), signum)

    threading.Thread(target=warn, daemon=True).start()
    assert supervise(lambda: launcher([sys.executable, "-u", str(stand_in)], 1), warning="USR1", grace_s=30) == 75
    assert trainers() == [] and DIRECTORY not in os.environ


def handles(pid: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGUSR1 - 1)))


@pytest.mark.usefixtures("processes")
def test_one_that_does_not_leave_is_killed_after_its_grace(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MORE_S", 0.5)
    pids: list[int] = []

    def warn() -> None:
        wait_for(lambda: bool(trainers()), 30)
        pids.extend(trainers())
        wait_for(lambda: b"deaf" in Path(f"/proc/{pids[0]}/cmdline").read_bytes(), 30)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=warn, daemon=True).start()
    words = [sys.executable, str(stand_in), "deaf"]
    status = supervise(lambda: launcher(words, 1), warning="USR1", grace_s=0.5)
    assert status != 0 and not alive(pids[0])


def test_what_fails_to_start_is_told() -> None:
    def start() -> int:
        raise OSError("no such launcher")

    with pytest.raises(OSError, match="no such launcher"):
        supervise(start, warning="USR1", grace_s=1)


@pytest.mark.parametrize(
    ("outcome", "status", "signum", "found"),
    [
        (None, 0, 0, 0),
        (None, 137, 0, 137),  # a rank was killed, and the others' word does not count
        (Outcome(1, False), 137, 0, 137),
        (Outcome(2, True), 1, 0, 2),  # a launcher that says 1 of everything
        (Outcome(75, False), 1, signal.SIGTERM, 75),
        (Outcome(75, False), 143, signal.SIGTERM, 75),
        (None, 1, signal.SIGTERM, 143),
        (None, None, signal.SIGTERM, 143),
        (Outcome(0, True), 1, 0, 1),
        (Outcome(0, True), 0, signal.SIGTERM, 0),
    ],
)
def test_the_status(outcome: Outcome | None, status: int | None, signum: int, found: int) -> None:
    assert _status(outcome, status, signum) == found


def test_what_a_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    for status in (0, 2, 75, 130):
        say_how(status, "rank 0")
    assert capsys.readouterr().err == ""
    say_how(137, "rank 1")
    say_how(1, "rank 0")
    assert "rank 1 was ended by signal 9" in (said := capsys.readouterr().err) and "rank 0 failed with status 1" in said
