"""Each moment is where its name says: seen by what has happened to the state when it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kill_points
from benchmarks.kill_points import Stop, arm
from tests.harness.ports import free_port
from tests.harness.runs import SMALL
from trainer import loop, run, starting
from trainer.compose import compose
from trainer.parallel import torch_engine


class Reached(BaseException):
    """Instead of waiting to be killed."""


@pytest.mark.parametrize(
    ("point", "computed", "updated"),
    [("forward", False, False), ("backward", False, False), ("inside the optimizer", True, True)],
)
def test_a_run_stops_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, computed: bool, updated: bool
) -> None:
    # What `arm` replaces comes back when the test ends.
    monkeypatch.setattr(loop, "train_step", loop.train_step)
    monkeypatch.setattr(torch_engine, "summed_loss", vars(torch_engine)["summed_loss"])
    monkeypatch.setattr(torch.optim.AdamW, "step", torch.optim.AdamW.step)
    placed = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    for key, value in placed.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    made: list[Any] = []
    make_training = starting.make_training
    monkeypatch.setattr(starting, "make_training", lambda *a: made.append(make_training(*a)) or made[-1])
    before: dict[str, torch.Tensor] = {}
    save = run.Saver.save

    def remember(self: Any, done: Any, *rest: Any, **options: Any) -> None:
        before.update({p.name: p.tensor.clone() for p in made[0].pieces()})
        save(self, done, *rest, **options)

    monkeypatch.setattr(run.Saver, "save", remember)

    def reached(self: Stop, point: str) -> None:
        self.mark(point)
        raise Reached

    monkeypatch.setattr(kill_points.Stop, "here", reached)
    marker = tmp_path / "marker"
    arm(point, Stop(3, marker))
    with pytest.raises((Reached, RuntimeError)):
        run.run(compose([*SMALL, f"run.dir={tmp_path / 'run'}", "train.steps=5"]))
    assert marker.read_text() == f"{point} of step 3"
    parameters = list(made[0].engine._bare.parameters())
    assert all(p.grad is not None for p in parameters) == computed
    changed = [not torch.equal(p.tensor, before[p.name]) for p in made[0].pieces() if p.name.startswith("model/")]
    assert any(changed) == updated and not all(changed)
