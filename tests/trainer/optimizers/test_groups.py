"""Param groups."""

from __future__ import annotations

import pytest
from torch import nn

from checkpointing import Held
from trainer.errors import Refused
from trainer.methods.method import Method
from trainer.optimizers import make_optimizer
from trainer.optimizers.groups import lr_scales, param_groups, whole_shapes
from trainer.options.config import Config
from trainer.options.optimizer import Optimizer
from trainer.parallel.computing import set_lr

CONFIG = Optimizer(lr=1e-3, weight_decay=0.1)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    config = Config(optimizer=CONFIG)
    decaying, others = make_optimizer(model, config, Method(config), lr_scales(model, CONFIG)).param_groups
    assert [p.shape for p in decaying["params"]] == [(4, 3)] and decaying["weight_decay"] == 0.1
    assert [p.shape for p in others["params"]] == [(4,)] * 3 and others["weight_decay"] == 0.0


def test_what_is_frozen_is_in_no_group() -> None:
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    (group,) = param_groups(model, CONFIG, lr_scales(model, CONFIG), Method(Config()).decays)
    assert group["params"] == [model.weight]


def test_learning_rates_by_the_names_of_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[3].weight = model[2].weight  # tied: either of its names will do
    config = Optimizer(lr=1e-3, weight_decay=0.1, lr_scale=[r"^3\.:0.1", "^[02]:0.5"])
    scales = lr_scales(model, config)
    assert scales == {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 1, "1.bias": 1, "2.weight": 0.1, "3.weight": 0.1}
    optimizer = make_optimizer(model, Config(optimizer=config), Method(Config(optimizer=config)), scales)
    set_lr(optimizer.param_groups, 2.0)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    expected = {"0.weight": (1.0, 0.1), "0.bias": (1.0, 0), "1.weight": (2.0, 0), "1.bias": (2.0, 0)}
    expected["2.weight"] = (0.2, 0.1)
    assert {name: pytest.approx(found[id(p)]) for name, p in model.named_parameters()} == expected


def test_a_pattern_that_matches_nothing_that_trains_is_refused() -> None:
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    with pytest.raises(Refused, match=r"optimizer\.lr_scale names bias, .* such as weight\."):
        lr_scales(model, Optimizer(lr=1e-3, lr_scale=["weight:0.5", "bias:0.1"]))


def test_shapes_are_those_before_the_cut() -> None:
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    assert whole_shapes(model, {}) == {model.weight: (4, 3)}
    assert whole_shapes(model, {"weight": Held((8, 3), [[(0, 4)], [(0, 3)]])}) == {model.weight: (8, 3)}
