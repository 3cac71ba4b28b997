"""Every family under FSDP2 x TP, a pipeline and ZeRO-3, and from each to the next: contents, forwards and losses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from checkpointing import Piece, load, save
from tests.harness.engines import BARS, STEPS, contents_differ, furthest, resume, start, train_and_save
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.zoo import MODELS, save_model
from trainer.compose import compose
from trainer.methods import build

LAYOUTS = {
    "fsdp x tp": (4, ["parallel=tp", "parallel.dp_shard=2"]),
    "pp": (2, ["parallel=pp"]),
    "zero 3": (2, ["parallel=zero3"]),
}


def resume_under(overrides: list[str], source: Path, again: Path) -> dict:
    return resume(overrides, source, again, control=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_goes_from_each_layout_to_the_next(name: str, tmp_path: Path, world: SharedWorld) -> None:
    save_model(tmp_path / "model", name)
    model = ["model=hf", f"model.path={tmp_path / 'model'}"]
    uninterrupted = start(model).train(1, 2 * STEPS)
    names = list(LAYOUTS)
    number = list(MODELS).index(name) % 3  # where the ring is open takes turns
    ring = [*names[number:], *names[:number]]
    size, overrides = LAYOUTS[ring[0]]
    for found in world.run(train_and_save, size, [*model, *overrides], tmp_path / ring[0]):
        assert furthest(found["losses"], uninterrupted[:STEPS]) <= BARS["fp32"] and found["wrong"] == []
    for source, target in pairwise(ring):
        size, overrides = LAYOUTS[target]
        for found in world.run(resume_under, size, [*model, *overrides], tmp_path / source, tmp_path / target):
            assert found["same_forward"], (source, target)
            assert furthest(found["losses"], uninterrupted[STEPS:]) <= BARS["fp32"], (source, target)
        assert contents_differ(tmp_path / source, tmp_path / target) == []


def test_adapters_around_the_experts_parameters_go_on_under_another_layout(tmp_path: Path, world: SharedWorld) -> None:
    save_model(tmp_path / "model", "mixtral")  # of a layer's experts two parameters are adapted, one around the other
    model = ["model=hf", f"model.path={tmp_path / 'model'}", "method=lora"]
    uninterrupted = start(model).train(1, 2 * STEPS)
    train_and_save(model, tmp_path / "a")
    for found in world.run(resume_under, 2, [*model, "parallel=fsdp"], tmp_path / "a", tmp_path / "b"):
        assert found["same_forward"]
        assert furthest(found["losses"], uninterrupted[STEPS:]) <= BARS["fp32"]
    assert contents_differ(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize("what", ["mlp.gate_up_proj", "self_attn.qkv_proj"])
def test_halves_and_heads_in_another_order_are_found(what: str, tmp_path: Path) -> None:
    """With the same norm they would not be, which is why contents are compared."""
    save_model(tmp_path / "model", "phi3")
    model = ["model=hf", f"model.path={tmp_path / 'model'}"]
    train_and_save(model, tmp_path / "saved")
    name = f"model/model.layers.1.{what}.weight"
    size = tuple(dict(build(compose([*model, "train.seq_len=12"]), "meta").named_parameters())[name[6:]].shape)
    whole = torch.zeros(size)
    load(tmp_path / "saved", [Piece(name, whole, (0, 0), size)], only=[name])
    half = 29 if "gate" in what else 8
    order = [*range(half, 2 * half), *range(half), *range(2 * half, size[0])]  # gate and up; the first two heads
    for directory, tensor in (("a", whole), ("b", whole[order].contiguous())):
        save(tmp_path / directory, 1, [Piece(name, tensor, (0, 0), size)])
    torch.testing.assert_close(whole.norm(), whole[order].norm())
    assert contents_differ(tmp_path / "a", tmp_path / "b") == [name]
