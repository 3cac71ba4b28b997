"""The tracker: everything on rank 0, nothing elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpointing import LeaseHeldError, UnreadableError
from trainer.compose import compose
from trainer.track.console import Console
from trainer.track.tracker import RunTracker


def test_only_rank_0_writes(in_tmp: Path) -> None:
    config = compose(["tracking=none", "run.dir=here"])
    row = {"step": 1, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0, "step_s": 0.1}
    silent = RunTracker(config, "id", rank=1)
    silent.step(row)
    silent.emit("start")
    silent.sync()
    silent.close(0)
    assert list(in_tmp.iterdir()) == []
    (in_tmp / "here").mkdir()
    loud = RunTracker(config, "id", rank=0)
    loud.step(row)
    assert "mfu" not in row
    loud.emit("start", step=0)
    loud.sync()
    loud.close(0)
    assert sorted(p.name for p in (in_tmp / "here").iterdir()) == ["events.jsonl", "metrics.jsonl"]
    assert all(len(p.read_text().splitlines()) == 1 for p in (in_tmp / "here").iterdir())
    half = RunTracker(config, "id", rank=0, full_speed=5.0)
    half.step(row := {**row, "step": 2, "world_size": 2})
    half.sample(2, "a", "b")
    half.close(0)
    assert row["mfu"] == 0.5
    assert (in_tmp / "here" / "samples.jsonl").read_text() == '{"step": 2, "prompt": "a", "text": "b"}\n'


class Watched:
    """Leases that are held, lost, or of which it cannot be told."""

    why: Exception | None = None

    def check(self, *, anew: bool = False) -> None:
        if self.why is not None:
            raise self.why


ROW = {"loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0, "step_s": 0.1}


@pytest.fixture
def watched(in_tmp: Path) -> tuple[RunTracker, Watched, Callable[[], int]]:
    (in_tmp / "here").mkdir()
    leases = Watched()
    config = compose(["tracking=none", "run.dir=here", "tracking.print_every=1"])
    tracker = RunTracker(config, "id", rank=0, leases=leases)  # type: ignore[arg-type]
    tracker.step({**ROW, "step": 1})
    tracker.emit("start", step=0)
    return tracker, leases, lambda: sum(p.stat().st_size for p in Path("here").rglob("*") if p.is_file())


@pytest.mark.parametrize("act", ["step", "sample", "emit", "sync"])
def test_nothing_is_written_once_another_process_has_the_run(
    act: str, watched: tuple[RunTracker, Watched, Callable[[], int]], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker, leases, size = watched
    before = size()
    capsys.readouterr()
    leases.why = LeaseHeldError("another process took it over")
    arguments: dict[str, tuple[object, ...]] = {
        "step": ({**ROW, "step": 2},),
        "sample": (2, "a", "b"),
        "emit": ("failure",),
        "sync": (),
    }
    with pytest.raises(LeaseHeldError):
        getattr(tracker, act)(*arguments[act])
    leases.why = None
    tracker.close(1)  # also what waited
    assert size() == before and capsys.readouterr().out == ""


def test_what_is_told_while_that_is_not_known_waits(
    watched: tuple[RunTracker, Watched, Callable[[], int]],
) -> None:
    tracker, leases, size = watched
    before = size()
    leases.why = UnreadableError("Input/output error")
    tracker.step({**ROW, "step": 2})
    tracker.emit("commit", step=2)
    tracker.sample(2, "a", "b")
    with pytest.raises(OSError, match="cannot be told"):
        tracker.sync()  # so no checkpoint is made
    assert size() == before
    leases.why = None
    tracker.step({**ROW, "step": 3})
    tracker.sync()
    tracker.close(0)
    lines = Path("here/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert len(Path("here/events.jsonl").read_text().splitlines()) == 2 and Path("here/samples.jsonl").exists()


def test_what_never_became_known_is_said_and_the_terminal_given_back(
    watched: tuple[RunTracker, Watched, Callable[[], int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker, leases, _ = watched
    closed = list[int]()
    monkeypatch.setattr(Console, "close", lambda _, status: closed.append(status))
    leases.why = UnreadableError("Input/output error")
    tracker.step({**ROW, "step": 2})
    tracker.close(1)
    assert closed == [1] and "could not be written: whether it is still its own is not known" in caplog.text
