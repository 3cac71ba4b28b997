"""What a method does that says nothing: full fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointing import Piece
from tests.trainer.methods.conformance import Trained
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods.method import Method, Needs, lasting
from trainer.methods.tuned_runs import Tuned


def test_nothing_is_frozen_added_or_needed() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    method = Method(compose([]))
    assert method.attach(model) is model and all(p.requires_grad for p in model.parameters())
    assert [name for name, p in model.named_parameters() if method.decays(name, p)] == ["0.weight"]
    assert not method.adds("0.weight") and not method.calibrates and method.needs(model) == Needs()
    assert method.needs(model).beyond(1, 1, 1) == 0
    optimizer = torch.optim.SGD(model.parameters())
    assert method.optimizer([], lambda: optimizer) is optimizer
    assert method.after(torch.ones(()), None) is None


def test_a_buffer_that_is_written_under_the_fence_is_not_volatile() -> None:
    piece = Piece("buffer/x", torch.zeros(1), (0,), (1,), volatile=True)
    assert not lasting(piece).volatile and lasting(piece).tensor is piece.tensor


def test_what_leaves_a_full_run_is_its_weights_and_where_they_differ(tmp_path: Path) -> None:
    trained = Trained.by("full", tmp_path, steps=2)
    run = Tuned.open(tmp_path)
    merged = dict(run.merged().named_parameters())
    assert all(torch.equal(merged[name], weight) for name, weight in trained.weights.items())
    delta = run.delta()
    assert delta.method == "full" and set(delta.entries) <= merged.keys() and delta.count > 0
    with pytest.raises(Refused, match=r"A run of method=full has no adapter\. `merge` writes"):
        run.adapted()
