"""Param groups."""

from __future__ import annotations

from torch import nn

from trainer.config import Optimizer
from trainer.parallel.optimizing import make_optimizer, param_groups

CONFIG = Optimizer(lr=1e-3, weight_decay=0.1)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decaying, others = make_optimizer(model, CONFIG).param_groups
    assert [p.shape for p in decaying["params"]] == [(4, 3)] and decaying["weight_decay"] == 0.1
    assert [p.shape for p in others["params"]] == [(4,)] * 3 and others["weight_decay"] == 0.0


def test_what_is_frozen_is_in_no_group() -> None:
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    (group,) = param_groups(model, CONFIG)
    assert group["params"] == [model.weight]
