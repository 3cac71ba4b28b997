"""Sums of squared gradients, and what a full phase changed, against plain autograd on the same micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.engines import LAYOUTS, start
from tests.harness.worlds import SharedWorld
from tests.trainer.methods.conformance import base_model, overrides
from trainer.methods.sparse import method as sparse
from trainer.methods.sparse.calibration import layer_of
from trainer.parallel.computing import logits_of, summed_loss


def sums_by_hand(squared: bool) -> dict[str, torch.Tensor]:
    started = start(["method=full", "train.steps=18", "train.micro_batch=2"])
    share = started.feed.step(1)
    model = base_model(started.config).train()
    found: dict[str, torch.Tensor] = {}
    for _, batch in share.micro_batches:
        model.zero_grad()
        (summed_loss(logits_of(model, batch.inputs, low=None), batch.labels) / share.num_targets).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            gradient: Any = parameter.grad
            found[name] = found.get(name, torch.zeros_like(gradient)) + (gradient**2 if squared else gradient)
    return found


def judged(layout: str, method: str) -> dict[str, torch.Tensor]:
    """What the selector is given, on this rank, of the weights that it owns."""
    seen: dict[str, torch.Tensor] = {}
    whole = sparse.by_gradient

    def listening(*arguments: Any) -> Any:
        subjects = whole(*arguments)

        def subject(name: str, mine: bool) -> Any:
            found = subjects(name, mine)
            if found is not None:
                seen[f"{name}.weight"] = found.gradient.clone()
            return found

        return subject

    sparse.by_gradient = listening
    try:
        start([*overrides("spt"), f"method.selector={method}", *LAYOUTS[layout][1]]).train(1, 1)
    finally:
        sparse.by_gradient = whole
    return seen


@pytest.mark.parametrize("layout", ["single", "fsdp x tp", "zero 2", "pp"])
@pytest.mark.parametrize("method", ["squared_gradient", "gradient"])
def test_gradients_are_summed_over_all_micro_batches(layout: str, method: str, world: SharedWorld) -> None:
    size, _ = LAYOUTS[layout]
    expected = sums_by_hand(method == "squared_gradient")
    found: dict[str, torch.Tensor] = {}
    for part in world.run(judged, size, layout, method):
        assert not found.keys() & part.keys()  # each weight has one owner
        found |= part
    assert len(found) == 35
    for name, total in found.items():
        small = 1e-5 * float(expected[name].abs().max())  # sums that cancel have the rounding of their parts
        torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=small, msg=name)


def test_layers_of_a_model_are_told_by_their_number() -> None:
    assert layer_of("model.layers.3.mlp.up_proj") == layer_of("model.layers.3.self_attn.q_proj") == "model.layers.3"
    assert layer_of("project_in") == "project_in"
