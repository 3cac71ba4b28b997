"""Tensor parallelism: every family computes, split over ranks, what it does whole; what cannot be split is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_torch_engine import train_steps, whole
from tests.trainer.parallel.zoo import MODELS
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods import build
from trainer.models import families
from trainer.parallel import shares, tensor
from trainer.parallel.tensor import check_splittable


def overrides(directory: Path, name: str) -> list[str]:
    return ["train.global_batch=6", "train.micro_batch=2", "model=hf", f"model.path={directory / name}"]


LAYOUTS = [
    (2, ["parallel.tp=2"]),
    (3, ["parallel.tp=3"]),
    (4, ["parallel.tp=2", "parallel.dp_shard=2"]),
    (4, ["parallel.tp=2", "parallel.dp_replicate=2"]),
]


def assert_alike(results: list[dict], alone: dict) -> None:
    for result in results:
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=2e-5)
        assert result["eval"] == pytest.approx(alone["eval"], rel=1e-5)
    model = whole(results)
    assert model.keys() == {name for name, *_ in alone["parts"]}
    for name, _, shape, part in alone["parts"]:
        assert model[name].shape == shape and np.isfinite(model[name]).all()
        np.testing.assert_allclose(model[name], part, atol=4e-4, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_trains_split_as_it_does_whole(directory: Path, name: str, world: SharedWorld) -> None:
    common = overrides(directory, name)
    alone = train_steps(common, 3)
    # Every family is split evenly and unevenly, and sharded further; which layouts do it takes turns.
    number = list(MODELS).index(name)
    for size, layout in (LAYOUTS[number % 2], LAYOUTS[2 + number % 2]):
        assert_alike(world.run(train_steps, size, [*common, *layout], 3), alone)


def test_adapters_are_split_with_the_layers_they_adapt(directory: Path, world: SharedWorld) -> None:
    for name in ("llama_tied", "gpt2", "phi3"):
        common = [*overrides(directory, name), "method=lora", "method.r=3"]
        alone = train_steps(common, 3)
        assert any("lora_A" in part for part, *_ in alone["parts"])
        assert_alike(world.run(train_steps, 4, [*common, "parallel.tp=2", "parallel.dp_shard=2"], 3), alone)


def train_wrongly(overrides: list[str], what: str) -> dict:
    """With one part of the mechanism broken."""
    if what == "gradients of what all ranks share are not added up":
        tensor.Cuts.finish = lambda *_: ()  # type: ignore[method-assign,assignment]
    elif what == "every rank counts its copy in the norm":
        tensor.Cuts.counted = lambda _, name, gradient, first: iter([gradient])  # type: ignore[method-assign,assignment]
    return train_steps(overrides, 3)


@pytest.mark.parametrize(
    "what",
    ["gradients of what all ranks share are not added up", "every rank counts its copy in the norm"],
)
def test_the_comparison_sees_what_is_broken(directory: Path, what: str, world: SharedWorld) -> None:
    common = overrides(directory, "gemma")
    with pytest.raises(AssertionError):
        assert_alike(world.run(restored, 2, [*common, "parallel.tp=2"], what), train_steps(common, 3))


def restored(overrides: list[str], what: str) -> dict:
    before = tensor.Cuts.finish, tensor.Cuts.counted
    try:
        return train_wrongly(overrides, what)
    finally:
        tensor.Cuts.finish, tensor.Cuts.counted = before  # type: ignore[method-assign]


def built(directory: Path, name: str, *more: str) -> torch.nn.Module:
    return build(compose([*overrides(directory, name), "train.seq_len=12", *more]), "meta")


@pytest.mark.usefixtures("long")
def test_what_cannot_be_split_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_splittable(built(directory, "gemma"), 3)
    with pytest.raises(Refused, match=r"Type parallel\.tp=3"):
        check_splittable(built(directory, "gemma"), 4)
    for more in (["method=lora", "method.dropout=0.1"],):
        with pytest.raises(Refused, match="does not go with dropout inside of layers"):
            check_splittable(built(directory, "llama", *more), 2)
    with pytest.raises(Refused, match="does not go with dropout inside of layers"):
        check_splittable(build(compose(["model.dropout=0.1"]), "meta"), 2)
    with pytest.raises(Refused, match="does not go with adapters on experts, embeddings or the output"):
        check_splittable(built(directory, "mixtral", "method=lora"), 2)
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(Refused, match="does not go with adapters on experts, embeddings or the output"):
            check_splittable(built(directory, "llama", "method=lora", f"method.target_modules=[{target}]"), 2)
    monkeypatch.delitem(families.FAMILIES, "llama")
    with pytest.raises(Refused, match=r"no plan to split a llama model .* Type parallel\.tp=1"):
        check_splittable(built(directory, "llama"), 2)


def test_a_plan_that_computes_something_else_is_found_at_the_start(directory: Path, world: SharedWorld) -> None:
    common = [*overrides(directory, "mistral"), "parallel.tp=2"]
    for said in world.run(swapped, 2, common):
        assert "computes something else than it did whole" in said


def swapped(overrides: list[str]) -> str:
    """With the heads of keys taken in another order than those of queries."""
    before = tensor.share_of

    def wrong(heads: int, kv: int, size: int, ranks: int, at: int) -> shares.Share:
        share, other = before(heads, kv, size, ranks, at), before(heads, kv, size, ranks, ranks - 1 - at)
        start = min(other.kv_heads[0], kv - share.kv_heads[1])
        return shares.Share(share.heads, (start, share.kv_heads[1]), heads, kv, size, share.first)

    tensor.share_of = wrong
    try:
        train_steps(overrides, 1)
    except Refused as refused:
        return str(refused)
    finally:
        tensor.share_of = before
    return "was not refused"
