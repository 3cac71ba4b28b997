"""A low-rank pair beside a frozen weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.harness.engines import Started, furthest, start
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.zoo import save_model
from trainer.methods.sparse.promoted import PromotedLayer, make_promoted


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


def trained(path: Path, overrides: list[str], without: bool = False) -> list[float]:
    """The losses of a model whose matrices all have pairs; `without` what they add to a product without bias."""
    with pytest.MonkeyPatch.context() as patch:
        if without:
            patch.setattr(PromotedLayer, "product", lambda self, inputs: inputs @ self.weight)
        chosen = ["method=spt", "method.density=0.2", "method.promote_rank=2", "method.promote_alpha=1e6"]
        started = start(["model=hf", f"model.path={path}", *chosen, "train.micro_batch=2", *overrides])
        assert all(isinstance(layer, PromotedLayer) for name, layer in started_layers(started, "c_proj"))
        return started.train(1, 6)


def started_layers(started: Started, ending: str) -> list[tuple[str, nn.Module]]:
    started.train(1, 1)  # which selects
    engine: Any = started.training.engine
    return [(name, layer) for name, layer in engine._bare.named_modules() if name.endswith(ending)]


def test_a_pair_beside_a_weight_that_is_cut_by_inputs_counts_also_where_there_is_a_bias(
    tmp_path: Path, world: SharedWorld
) -> None:
    """GPT-2's outputs of attention and MLP have one, which is added when the ranks' shares are."""
    save_model(tmp_path, "gpt2")
    alone = trained(tmp_path, [])
    assert furthest(world.run(trained, 2, tmp_path, ["parallel=tp"])[0], alone) < 1e-5
    assert furthest(world.run(trained, 2, tmp_path, ["parallel=tp"], True)[0], alone) > 1e-5  # the control
