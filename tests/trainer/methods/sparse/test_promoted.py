"""A low-rank pair beside a frozen weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.methods.sparse.promoted import make_promoted


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), Conv1D(3, 5)], ids=["Linear", "Conv1D"])
def test_it_adds_nothing_at_first_and_then_a_product(layer: nn.Module) -> None:
    x = torch.randn(2, 5)
    before = layer(x)
    make_promoted(layer, 2)
    assert torch.equal(layer(x), before)
    a, b = (layer.get_submodule(f"lora_{one}").weight for one in "AB")
    assert a.shape == (2, 5) and b.shape == (3, 2)  # type: ignore[union-attr]
    with torch.no_grad():
        b.fill_(0.5)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(layer(x), before + x @ (b @ a).T)  # type: ignore[operator,union-attr]
