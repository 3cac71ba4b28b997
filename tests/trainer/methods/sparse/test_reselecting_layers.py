"""Re-selections in a run: what is dropped goes back or stays, what trains is what the score says, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.engines import start
from tests.trainer.methods.conformance import base_model, overrides
from trainer.compose import compose
from trainer.methods.selection.scores import SCORES, Subject
from trainer.methods.sparse.reselecting_layers import is_due
from trainer.options.method import Sparse


def snapshot(started: Any) -> dict[str, dict[str, torch.Tensor]]:
    state = started.training.engine._optimizer.state
    return {
        name: {
            "indices": layer.sparse_indices.long().clone(),
            "values": layer.sparse_values.detach().clone(),
            "weight": layer.weight.detach().clone(),
            **{key: one.clone() for key, one in state[layer.sparse_values].items()},
        }
        for name, layer in started.training.method._trained.layers.items()
    }


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("method", ["spiel", "spiel_ma"])
def test_regrowing_drops_the_least_changed_back_to_the_base(method: str) -> None:
    started = start([*overrides(method), "method.rate=0.6"])
    base: Any = dict(base_model(started.config).named_parameters())
    started.train(1, 9)
    before = snapshot(started)
    started.train(10, 10)  # a step, and then the second re-selection
    moved = 0
    for name, now in snapshot(started).items():
        was, original = before[name], base[f"{name}.weight"].detach().view(-1)
        stay = torch.isin(now["indices"], was["indices"])
        assert now["indices"].numel() == was["indices"].numel() and bool((now["indices"].diff() > 0).all())
        gone = was["indices"][~torch.isin(was["indices"], now["indices"])]
        assert torch.equal(now["weight"].view(-1)[gone], original[gone])
        assert now["values"][~stay].eq(0).all()
        if "age" in now:
            assert now["age"][~stay].eq(2).all() and now["age"][stay].gt(2).all()
        untouched = torch.ones(original.numel(), dtype=torch.bool)
        untouched[now["indices"]] = False
        assert torch.equal(now["weight"].view(-1)[untouched], original[untouched])
        if gone.numel() and stay.any():
            left = now["values"][stay].abs()
            moved += gone.numel()
            # Those that went were the least changed a step before, up to that one step.
            assert was["values"][torch.isin(was["indices"], gone)].abs().max() <= left.min() + 2e-3
    assert moved


def test_renewing_takes_the_principal_weights_and_keeps_what_was_learned() -> None:
    started = start([*overrides("lift"), "optimizer.lr=0.05"])
    started.train(1, 4)
    before = snapshot(started)
    trained: Any = started.training.method._trained  # type: ignore[attr-defined]
    weights = {}

    def remember(position: int) -> None:
        weights.update({n: layer.weight.detach().clone() for n, layer in trained.layers.items()})

    step = started.training.engine.step  # type: ignore[attr-defined]
    started.training.engine.step = lambda *a: (step(*a), trained.write(), remember(5))[0]  # type: ignore[attr-defined]
    started.train(5, 5)
    settled = 0
    for name, now in snapshot(started).items():
        score = SCORES[next(s for s in SCORES if s.name == "low_rank")](Subject(weights[name], 0, 4)).reshape(-1)
        count = now["indices"].numel()
        assert float(score[now["indices"]].min()) >= float(score.topk(count).values[-1]) * (1 - 1e-5)
        assert torch.equal(now["weight"], weights[name])  # nothing goes back
        stay = torch.isin(now["indices"], before[name]["indices"])
        assert now["age"][stay].eq(5).all() and now["age"][~stay].eq(0).all()
        entries = trained.states[name].settled
        settled += entries.indices.numel()
        both = (entries.originals + entries.values) == now["weight"].view(-1)[entries.indices.long()]
        assert both.all()
    assert settled


def test_narrowing_goes_on_with_what_is_still_below_and_keeps_the_rest() -> None:
    started = start([*overrides("sara"), "method.nuclear=0"])
    started.train(1, 6)
    before = snapshot(started)
    started.train(7, 7)
    after, trained = snapshot(started), started.training.method._trained  # type: ignore[attr-defined]
    for name, was in before.items():
        if name not in after:
            continue
        assert torch.isin(after[name]["indices"], was["indices"]).all()
        original = trained.layers[name].sparse_originals
        assert (original + after[name]["values"]).abs().lt(0.005).all()
        assert after[name]["age"].eq(7).all()
        gone = trained.states[name].settled
        assert (gone.originals + gone.values).abs().ge(0.005).all()
        assert gone.indices.numel() + after[name]["indices"].numel() == was["indices"].numel()


@pytest.mark.parametrize(
    ("method", "steps", "due"),
    [
        ("spiel", 100, {20, 40, 60, 80}),
        ("random_sparse", 100, set()),
        ("lt_sft", 100, {50}),
        ("lt_sft", 1, set()),
        ("sara", 3000, {2500}),
        ("sara", 100, set()),
    ],
)
def test_when_entries_are_selected_anew(method: str, steps: int, due: set[int]) -> None:
    config = compose([f"method={method}", f"train.steps={steps}"])
    assert isinstance(config.method, Sparse)
    assert {n for n in range(1, steps + 1) if is_due(config, config.method, n)} == due
