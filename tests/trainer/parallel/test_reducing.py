"""A reducer is asked for what ranks add up, under every layout; of another kind it goes through the matrix
(tests/trainer/test_plugins.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.engines import start
from trainer.options.parallel import REDUCERS, Parallel
from trainer.parallel.mesh import Mesh
from trainer.parallel.reducing import PlainReducer, make_reducer
from trainer.plan import Topology


class Doubling(PlainReducer):
    """Doubles the gradient, and counts what it is asked."""

    asked: list[str] = []  # noqa: RUF012

    def attach(self, called: nn.Module) -> None:
        self.asked.append("attach")

    def finish(self, gradients: Any) -> None:
        self.asked.append("finish")
        for gradient in gradients.values():
            gradient.mul_(2)

    def sum(self, values: torch.Tensor, *axes: str) -> torch.Tensor:
        self.asked.append("sum " + " ".join(axes))
        return values


def test_the_plain_one_leaves_gradients_alone() -> None:
    plain = make_reducer(Parallel(), Mesh(Topology(), 0, None))
    gradient = torch.ones(3)
    plain.attach(nn.Linear(1, 1))
    plain.finish({"w": gradient})
    assert torch.equal(gradient, torch.ones(3)) and torch.equal(plain.sum(gradient, "pp"), torch.ones(3))


def test_the_one_that_is_named_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REDUCERS, "doubling", f"{__name__}:Doubling")
    Doubling.asked.clear()
    plain, doubled = start([]), start(["parallel.reducer=doubling"])
    norms = []
    for started in (plain, doubled):
        batches = started.feed.step(1)
        started.training.engine.accumulate(batches.micro_batches, 1.0)
        norms.append(float(started.training.engine.step(0.0)))
    assert norms[1] == pytest.approx(2 * norms[0])
    assert Doubling.asked == ["attach", "finish", "sum pp dp_shard tp"]
