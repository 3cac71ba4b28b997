"""Where a run is, by its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpointing.lease import Lease
from checkpointing.storage import FileStorage
from launch import status
from launch.__main__ import main
from launch.status import POINTS, Status, summary
from tests.harness.runs import SMALL, train
from trainer.errors import Refused

RUN = [*SMALL, "train.steps=4", "checkpoint.every=2", "schedule=constant"]


def test_a_run_that_is_finished_running_and_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train([*RUN, f"run.dir={run}"])
    capsys.readouterr()
    found = Status.of(run)
    assert (found.state, found.step, found.total, found.durable, found.restarts) == ("finished", 4, 4, 4, 0)
    assert found.loss is not None and found.eval_loss is not None and found.tokens_per_s > 0
    lease = Lease.acquire(FileStorage(run / ".lease"))
    assert Status.of(run).state == "running"
    lease.release()
    with open(run / "events.jsonl", "a") as file:
        file.write('{"event": "snapshot", "step": 9, "generation": "x"}\n{"event": "resume", "step": 4}\n{"torn')
    found = Status.of(run)
    assert (found.state, found.restarts, found.snapshot) == ("dead", 1, 9)
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "state      dead" in said and "in memory  step 9" in said and "durable    step 4" in said


def test_where_nothing_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match="is no run"):
        Status.of(tmp_path)
    assert main(["status", str(tmp_path)]) == 2
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job").write_text("12\n")
    assert main(["status", str(tmp_path)]) == 0
    assert "waiting (job 12)" in capsys.readouterr().out


def test_a_sweep_as_a_table(tmp_path: Path) -> None:
    points = [{"dir": str(n), "overrides": ["method=full", f"optimizer.lr={lr}"]} for n, lr in enumerate((1, 2, 3))]
    (tmp_path / POINTS).write_text(json.dumps(points))
    for number, loss in ((0, 2.0), (1, 1.5)):
        run = tmp_path / str(number)
        run.mkdir()
        (run / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "finish", "step": 3}\n')
        (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 9.0, "eval_loss": loss, "tokens_per_s": 1}))
    lines = [line.split() for line in summary(tmp_path).splitlines()]
    assert lines[0] == ["point", "state", "step", "loss", "held", "out", "optimizer.lr"]
    assert lines[1] == ["1", "finished", "3/0", "9.0000", "1.5000", "2"]
    assert lines[2][0] == "0" and lines[3] == ["2", "not", "started", "0/0", "3"]


def test_what_somebody_else_wrote_is_shown_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is resolved, unfolded or believed to have a type."""
    monkeypatch.setenv("A_SECRET", "of the reader")
    (tmp_path / "events.jsonl").write_text('{"x": 1}\n{"event": "snapshot", "generation": "g", "step": "no"}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": [], "loss": "low", "tokens_per_s": null, "eval_loss": {}}\n')
    bomb = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]" for n in range(9))
    for text in (
        "train: {steps: '${oc.env:A_SECRET}'}\ncheckpoint: {dir: [1]}\n",
        bomb,
        "[" * 50_000,
        "a: b: c",
        "\x00",
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert "of the reader" not in str(Status.of(tmp_path))


def test_points_of_a_sweep_lie_right_below_it() -> None:
    assert status._is_point({"dir": "0", "overrides": ["a=1"]})
    for odd in (
        1,
        {},
        {"dir": "../x", "overrides": []},
        {"dir": "..", "overrides": []},
        {"dir": "0", "overrides": [1]},
    ):
        assert not status._is_point(odd)
