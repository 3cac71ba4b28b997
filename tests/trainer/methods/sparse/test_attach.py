"""Which layers become sparse, the first selection, and combinations that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.models import save_tiny_model
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods import build
from trainer.methods.selection.choosing import Ranks
from trainer.methods.sparse.attach import (
    PROMOTED,
    attach,
    select,
    settle,
    targets_of,
    train_whole,
)
from trainer.methods.sparse.layer import SparseConv1D, SparseLayer, sparse_layers
from trainer.methods.sparse.promoted import PromotedLinear
from trainer.models import build_model
from trainer.options.method import Sparse

ALONE = Ranks.of(None, torch.device("cpu"))


def method(*overrides: str) -> Sparse:
    options = compose(["method=sparse", *overrides]).method
    assert isinstance(options, Sparse)
    return options


def model() -> nn.Module:
    return build_model(compose([]).model, seq_len=8, seed=0)


def settled(options: Sparse) -> dict[str, SparseLayer]:
    made = attach(model(), options, 0)
    chosen, _ = select(made, options, 0, ALONE)
    settle(made, options, 0, chosen)
    return sparse_layers(made)


def test_only_values_train_and_they_are_as_many_as_the_plan_says() -> None:
    made = build(compose(["method=sparse"]), "meta")
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert all(name.endswith("sparse_values") and p.dtype is torch.float32 for name, p in trained.items())
    layers = settled(method())
    assert sum(p.numel() for p in trained.values()) == sum(one.sparse_values.numel() for one in layers.values())


@pytest.mark.usefixtures("long")
def test_the_largest_weights_of_all_are_the_largest_of_one_long_vector() -> None:
    layers = settled(method("method.selector=magnitude", "method.allocator=whole", "method.density=0.003"))
    base = {n: m.weight.detach().abs().reshape(-1) for n, m in model().named_modules() if n in layers}
    everything = torch.cat([m.weight.detach().abs().reshape(-1) for _, (m, _) in targets_of(model(), method()).items()])  # type: ignore[union-attr,operator]
    least = everything.topk(round(0.003 * everything.numel())).values[-1]
    for name, layer in layers.items():
        assert torch.equal(layer.sparse_indices.long(), (base[name] >= least).nonzero()[:, 0])
        assert torch.equal(layer.sparse_originals.abs(), base[name][layer.sparse_indices.long()])


def test_below_a_threshold_and_none_below_it() -> None:
    layers = settled(method("method=sara", "method.threshold=1e-4"))
    assert all(float(one.sparse_originals.abs().max()) < 1e-4 for one in layers.values())
    with pytest.raises(Refused, match="method=sara selects nothing"):
        settled(method("method=sara", "method.threshold=0"))


def test_whole_heads_and_channels_of_s2ft() -> None:
    layers = settled(method("method=s2ft"))
    assert {name.rpartition(".")[2] for name in layers} == {"o_proj", "down_proj"}
    for name, layer in layers.items():
        if "o_proj" in name:  # one head of 32 channels, of eight
            assert torch.equal(layer.sparse_indices % 32, torch.arange(32)) and layer.sparse_indices[0] % 32 == 0
        assert layer.sparse_values.shape == (256, layer.sparse_indices.numel())
    assert len({int(one.sparse_indices[0]) for one in layers.values()}) > 2  # drawn for each by its name


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gpt2")
    config = compose(["model=hf", f"model.path={tmp_path}", "method=sparse", "method.target_modules=[c_proj]",
                      "method.granularity=inputs", "method.density=0.5", "train.seq_len=8"])  # fmt: skip
    made: Any = build(config)
    layers = sparse_layers(made)
    assert layers and all(isinstance(one, SparseConv1D) for one in layers.values())
    # Inputs are rows there, and those of the attention's output come in heads of four.
    assert {one.sparse_values.shape for n, one in layers.items() if "attn" in n} == {(8, 12)}
    assert {one.sparse_values.shape for n, one in layers.items() if "mlp" in n} == {(24, 12)}


def test_layers_without_hits_are_plain_and_those_with_many_are_promoted() -> None:
    options = method("method=spt")
    made = attach(model(), options, 0)
    names = list(sparse_layers(made))
    settle(made, options, 0, {names[0]: torch.arange(5), names[1]: torch.arange(4000)})
    assert list(sparse_layers(made)) == [names[0]]
    assert isinstance(made.get_submodule(names[1]), PromotedLinear)
    assert type(made.get_submodule(names[2])) is nn.Linear
    again = attach(model(), options, 0, {names[0]: 5, names[1]: PROMOTED})
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}
    with pytest.raises(Refused, match=r"method\.target_modules does not hold other"):
        attach(model(), options, 0, {"other": 5})


def test_in_a_full_phase_the_targets_train_as_they_are() -> None:
    options = method("method=lt_sft")
    made = attach(model(), options, 0)
    train_whole(made, options)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {
        f"{n}.weight" for n in targets_of(made, options)
    }
