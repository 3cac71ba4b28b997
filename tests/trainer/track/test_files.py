"""metrics.jsonl and events.jsonl: appended whole, rolled back without loss."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from trainer.track.files import Events, Metrics, roll_back


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


def test_a_row_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Metrics(tmp_path / "metrics.jsonl").step({"loss": float("nan")})


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


def test_a_torn_last_line_is_dropped_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, torn='{"st')
    Metrics(path).step({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_events_carry_both_clocks(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    events.emit("resume", step=12, tier="durable")
    events.close(0)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert list(event)[:3] == ["event", "step", "tier"] and event["event"] == "resume"
    assert abs(event["time"] - time.time()) < 60 and abs(event["monotonic"] - time.monotonic()) < 60
