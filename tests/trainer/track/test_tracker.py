"""The tracker: everything on rank 0, nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

from trainer.compose import compose
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
