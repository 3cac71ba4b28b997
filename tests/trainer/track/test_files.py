"""metrics.jsonl and events.jsonl: appended whole, rolled back without loss."""

from __future__ import annotations

import errno
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from trainer.track import files
from trainer.track.files import SPARE, Events, Metrics, read_lines, roll_back


def write(path: Path, *steps: int, torn: str = "") -> None:
    path.write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in steps) + torn)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_keep_their_full_precision(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.step({"step": 1, "loss": 0.1 + 0.2})
    metrics.sync()
    metrics.close(0)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.1 + 0.2}


def test_a_metric_that_is_no_number_is_written_as_such(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.step({"step": 1, "eval_loss": float("nan"), "a": float("inf"), "b": float("-inf"), "c": None})
    metrics.close(0)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "eval_loss": "nan", "a": "inf", "b": "-inf", "c": null}\n'


def test_rolled_back_steps_move_to_the_discarded(tmp_path: Path) -> None:
    path, discarded = tmp_path / "metrics.jsonl", tmp_path / "metrics.discarded.jsonl"
    write(path, *range(1, 26), torn='{"step": 26, "lo')
    assert roll_back(tmp_path, 20) == (5, 20)
    assert steps(path) == list(range(1, 21)) and steps(discarded) == list(range(21, 26))
    Metrics(path).step({"step": 21})
    assert steps(path) == list(range(1, 22))
    assert roll_back(tmp_path, 21) == (0, 21)
    assert roll_back(tmp_path, 0) == (21, 0)
    assert steps(path) == [] and len(steps(discarded)) == 26


def test_nothing_to_roll_back(tmp_path: Path) -> None:
    assert roll_back(tmp_path, 3) == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_from_the_first_unreadable_line_on_all_moves_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes() + b"\0" * 20 + b'\n{"step": 4}\n')
    assert roll_back(tmp_path, 5) == (2, 2)
    assert steps(path) == [1, 2]


def test_what_is_rolled_back_is_moved_without_being_held(tmp_path: Path) -> None:
    """Somebody else's file may have any number of lines."""
    path, discarded = tmp_path / "metrics.jsonl", tmp_path / "metrics.discarded.jsonl"
    write(path, 1)
    rest = b"[null]\n" * 40_000 + b'{"step": 9}\n'
    path.write_bytes(path.read_bytes() + rest)
    tracemalloc.start()
    try:
        assert roll_back(tmp_path, 20)[1] == 1
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert discarded.read_bytes() == rest and steps(path) == [1]


def test_a_torn_last_line_is_dropped_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, torn='{"st')
    Metrics(path).step({"step": 3})
    assert steps(path) == [1, 2, 3]


class Disk:
    """One on which writes, syncs, or both fail, while it does."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path) -> None:
        self.fails, self.takes, self._directory = set[str](), 1 << 30, str(directory)
        write, fsync = os.write, os.fsync

        def watched_write(descriptor: int, data: Any) -> int:
            if "write" in self.fails and self._is_on(descriptor):
                if not self.takes:
                    raise OSError(errno.ENOSPC, "No space left on device")
                data, self.takes = bytes(data)[: self.takes], max(0, self.takes - len(data))
            return write(descriptor, data)

        def watched_fsync(descriptor: int) -> None:
            if "fsync" in self.fails and self._is_on(descriptor):
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        patch.setattr(os, "write", watched_write)
        patch.setattr(os, "fsync", watched_fsync)

    def _is_on(self, descriptor: int) -> bool:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(self._directory)

    def fill(self, takes: int) -> None:
        self.fails, self.takes = {"write"}, takes


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def disk(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch, run_dir)


@pytest.mark.parametrize("takes", [0, 5, 31])
def test_lines_that_a_full_disk_does_not_take_are_written_when_it_does(
    takes: int, run_dir: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(run_dir / "metrics.jsonl")
    metrics.step({"step": 1})
    disk.fill(takes)
    for step in (2, 3, 4):
        metrics.step({"step": step})
    with pytest.raises(OSError, match="No space left"):
        metrics.sync()
    assert caplog.text.count("its lines are kept, and written when it can be") == 1
    disk.fails.clear()
    metrics.step({"step": 5})
    metrics.sync()
    assert steps(run_dir / "metrics.jsonl") == [1, 2, 3, 4, 5]


def test_what_a_failed_sync_may_have_lost_is_written_again(run_dir: Path, disk: Disk) -> None:
    path = run_dir / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.step({"step": 1})
    metrics.sync()
    for step in (2, 3):
        metrics.step({"step": step})
    disk.fails = {"fsync"}
    with pytest.raises(OSError, match="Input/output"):
        metrics.sync()
    disk.fails.clear()
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))  # what the kernel says once, and never again
    metrics.step({"step": 4})
    metrics.sync()
    assert steps(path) == [1, 2, 3, 4]


def test_lines_are_made_durable_now_and_then(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held in memory is bounded, also of a run that never saves."""
    monkeypatch.setattr(files, "LINES_HELD", 10)
    events = Events(run_dir / "events.jsonl")
    for step in range(25):
        events.emit("snapshot", step=step)
        assert len(events._lines) < 10
    assert steps(run_dir / "events.jsonl") == list(range(25))


def test_a_disk_that_stays_full_is_not_asked_for_every_line(
    run_dir: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that waits is written beside the checkpoints each time."""
    monkeypatch.setattr(files, "LINES_HELD", 10)
    written = list[int]()
    monkeypatch.setattr(files, "replace_file", lambda path, data: written.append(data.count(b"\n")))
    metrics = Metrics(run_dir / "metrics.jsonl", run_dir.parent / SPARE)
    disk.fill(0)
    for step in range(1, 36):
        metrics.step({"step": step})
    assert written == [10, 20, 30]


def test_lines_wait_beside_the_checkpoints_for_a_disk_that_stays_full(run_dir: Path, disk: Disk) -> None:
    """So that a checkpoint may be committed, which must not be without them."""
    path, spare = run_dir / "metrics.jsonl", run_dir.parent / SPARE
    metrics = Metrics(path, spare)
    metrics.step({"step": 1})
    metrics.sync()
    disk.fill(20)
    for step in range(2, 6):
        metrics.step({"step": step})
    metrics.sync()
    assert steps(spare) == [2, 3, 4, 5]
    metrics.step({"step": 6})
    metrics.close(0)
    assert steps(spare) == [2, 3, 4, 5, 6]
    disk.fails.clear()
    assert roll_back(run_dir, 4, spare) == (2, 4)
    assert steps(path) == [1, 2, 3, 4] and not spare.exists()
    assert steps(run_dir / "metrics.discarded.jsonl") == [5, 6]


def test_lines_that_came_home_do_not_wait_any_more(run_dir: Path, disk: Disk) -> None:
    spare = run_dir.parent / SPARE
    metrics = Metrics(run_dir / "metrics.jsonl", spare)
    disk.fill(0)
    metrics.step({"step": 1})
    metrics.sync()
    assert steps(spare) == [1]
    disk.fails.clear()
    metrics.sync()
    assert not spare.exists() and steps(run_dir / "metrics.jsonl") == [1]
    spare.write_text('{"step": 1}\n')  # by one that was killed before it was deleted
    assert roll_back(run_dir, 1, spare) == (0, 1) and steps(run_dir / "metrics.jsonl") == [1]


def test_a_file_that_cannot_be_opened_is_opened_later(tmp_path: Path) -> None:
    events = Events(tmp_path / "later" / "events.jsonl")
    events.emit("start", step=0)
    (tmp_path / "later").mkdir()
    events.emit("commit", step=1)
    events.close(0)
    assert steps(tmp_path / "later" / "events.jsonl") == [0, 1]


@pytest.mark.parametrize("what", ["a pipe", "a link", "a directory"])
def test_what_is_no_file_is_neither_waited_for_nor_followed(what: str, run_dir: Path) -> None:
    """As in a run directory that somebody else made."""
    path, precious = run_dir / "metrics.jsonl", run_dir.parent / "precious"
    precious.write_text('{"step": 7}\nno end')
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "a link":
        path.symlink_to(precious)
    else:
        path.mkdir()
    assert read_lines(path) == []
    with pytest.raises(OSError):  # which one is the system's
        roll_back(run_dir, 3)
    metrics = Metrics(path)
    metrics.step({"step": 8})
    metrics.close(0)
    assert precious.read_text() == '{"step": 7}\nno end'


def test_events_carry_both_clocks(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    events.emit("resume", step=12, tier="durable")
    events.close(0)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert list(event)[:3] == ["event", "step", "tier"] and event["event"] == "resume"
    assert abs(event["time"] - time.time()) < 60 and abs(event["monotonic"] - time.monotonic()) < 60
