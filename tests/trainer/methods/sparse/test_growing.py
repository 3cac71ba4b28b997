"""Candidates are those of the first micro-batch's dense gradient, and what is summed at them is the whole gradient."""

from __future__ import annotations

from typing import Any

import torch

from tests.harness.engines import start
from tests.trainer.methods.conformance import overrides
from trainer.parallel.computing import logits_of, summed_loss

# Re-selections every 5 steps after a window of 2: candidates in step 3, sums in steps 4 and 5.


def dense_gradients(started: Any, step: int, *, first_only: bool) -> dict[str, torch.Tensor]:
    """By autograd, of the weights as they are before a step."""
    model = started.training.engine._bare
    share = started.feed.step(step)
    weights = {f"{name}.weight": layer.weight for name, layer in started.training.method._trained.layers.items()}
    for weight in weights.values():
        weight.grad = None
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _, batch in share.micro_batches[: 1 if first_only else None]:
        leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        sources = dict(model.named_parameters())
        plain = {**sources, **leaves}
        logits = torch.func.functional_call(Dense(model), {f"model.{n}": p for n, p in plain.items()}, (batch.inputs,))
        loss = summed_loss(logits, batch.labels) / share.num_targets
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            found[name] += gradient
    return found


class Dense(torch.nn.Module):
    """The model with plain linear layers while it is called."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        layers = [m for m in self.model.modules() if hasattr(m, "sparse_values")]
        kinds = [type(m) for m in layers]
        for layer in layers:
            layer.__class__ = torch.nn.Linear
        try:
            return logits_of(self.model, inputs, low=None)
        finally:
            for layer, kind in zip(layers, kinds, strict=True):
                layer.__class__ = kind


def test_candidates_and_their_sums_are_those_of_autograd() -> None:
    started = start(overrides("spiel"))
    trained = started.training.method._trained  # type: ignore[attr-defined]
    started.train(1, 2)
    assert all(state.candidates.indices.numel() == 0 for state in trained.states.values())
    expected = dense_gradients(started, 3, first_only=True)
    started.train(3, 3)
    for name, layer in trained.layers.items():
        score = expected[f"{name}.weight"].abs().reshape(-1)
        active = layer.sparse_indices.long()
        score[active] = -1
        candidates = trained.states[name].candidates.indices.long()
        assert candidates.numel() == min(2 * active.numel(), score.numel() - active.numel())
        assert not torch.isin(candidates, active).any()
        assert float(score[candidates].min()) >= float(score.topk(candidates.numel()).values[-1]) * (1 - 1e-4)
    sums = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    for step in (4, 5):
        for name, gradient in dense_gradients(started, step, first_only=False).items():
            sums[name] += gradient
        if step == 4:
            started.train(4, 4)
    before = {name: state.candidates for name, state in trained.states.items()}
    assert all(float(one.sums.abs().sum()) > 0 for one in before.values())
    kept = {name: one.indices.clone() for name, one in before.items()}
    grown = {name: layer.sparse_indices.clone() for name, layer in trained.layers.items()}
    started.train(5, 5)
    for name, layer in trained.layers.items():
        # The first re-selection replaces all, by the largest sums among the candidates.
        total = sums[f"{name}.weight"].abs().reshape(-1)[kept[name].long()]
        count = layer.sparse_indices.numel()
        chosen = layer.sparse_indices.long()
        assert count == grown[name].numel() and torch.isin(chosen, kept[name].long()).all()
        whole = sums[f"{name}.weight"].abs().reshape(-1)
        assert float(whole[chosen].min()) >= float(total.topk(count).values[-1]) * (1 - 1e-3)
        assert trained.states[name].candidates.indices.numel() == 0
