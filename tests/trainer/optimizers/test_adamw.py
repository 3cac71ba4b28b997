"""torch's AdamW as a kind of optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.optimizers.adamw import AdamWKind
from trainer.options.config import Config
from trainer.options.optimizer import Implementation, Optimizer


@pytest.mark.parametrize("kind", [Implementation.fused, Implementation.foreach])
def test_it_is_torchs_with_the_options_that_were_given(kind: Implementation) -> None:
    options = Optimizer(implementation=kind, lr=0.1, betas=[0.5, 0.6], eps=1e-3, weight_decay=0.0)
    layer = nn.Linear(3, 2)
    made = AdamWKind(Config(optimizer=options)).make([{"params": [layer.weight], "weight_decay": 0.2}], {})
    assert type(made) is torch.optim.AdamW
    (group,) = made.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.2)
    assert bool(group["fused"]) == (kind is Implementation.fused)


def test_its_state_is_planned_and_shared_by_both_kernels() -> None:
    kind = AdamWKind(Config(optimizer=Optimizer(lr=0.1)))
    assert kind.bytes_of(torch.Size((3, 5))) == 2 * 4 * 15
    assert kind.goes_on_from("foreach") and not kind.goes_on_from("torchao_8bit")
    assert kind.about(nn.Linear(1, 1)) == "AdamW"
