"""Pipelines: every family trains in stages as it does whole, with tied weights, dropout and other layouts on top."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_tensor import assert_alike, overrides
from tests.trainer.parallel.test_torch_engine import SMALL, train_steps
from tests.trainer.parallel.zoo import MODELS
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods import build
from trainer.models import blocks
from trainer.options.parallel import PipelineSchedule
from trainer.parallel import pipeline
from trainer.parallel.pipeline import check_stages, cut_out, inside, stages_of

ONE_F_ONE_B, INTERLEAVED = PipelineSchedule["1f1b"], PipelineSchedule.interleaved


LAYOUTS = [
    (2, ["parallel.pp=2"]),
    (3, ["parallel.pp=3", "parallel.activation_checkpointing=true"]),
    (4, ["parallel.pp=2", "parallel.dp_shard=2"]),
    (4, ["parallel.pp=2", "parallel.tp=2", "parallel.pp_schedule=gpipe"]),
]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_trains_in_stages_as_it_does_whole(directory: Path, name: str, world: SharedWorld) -> None:
    common = overrides(directory, name)  # GPT-2 has dropout before and inside of its layers
    alone = train_steps(common, 3)
    number = list(MODELS).index(name)
    for size, layout in (LAYOUTS[number % 2], LAYOUTS[2 + number % 2]):
        assert_alike(world.run(train_steps, size, [*common, *layout], 3), alone)


def test_two_stages_a_process(world: SharedWorld) -> None:
    common = ["model.num_layers=5", "train.global_batch=6", "train.micro_batch=2"]  # three micro-batches: one is added
    alone = train_steps(common, 3)
    for more in ([], ["parallel.dp_shard=2"], ["parallel.dp_replicate=2"]):
        layout = ["parallel.pp=2", "parallel.pp_schedule=interleaved", *more]
        assert_alike(world.run(train_steps, 4 if more else 2, [*common, *layout], 3), alone)


def test_adapters_parts_and_fewer_micro_batches_than_stages(directory: Path, world: SharedWorld) -> None:
    for more in (["method=lora", "method.dropout=0.2"], ["parallel.local_batch=1"], ["train.global_batch=2"]):
        common = [*overrides(directory, "llama_tied"), *more]
        alone = train_steps(common, 3)
        results = world.run(train_steps, 3, [*common, "parallel.pp=3", "parallel.pp_schedule=gpipe"], 3)
        assert_alike(results, alone)


def test_bf16_computes_in_stages_what_it_does_whole(directory: Path, world: SharedWorld) -> None:
    common = [*overrides(directory, "qwen3"), "precision=bf16"]
    alone = train_steps(common, 3)
    for result in world.run(train_steps, 2, [*common, "parallel.pp=2"], 3):
        np.testing.assert_allclose(result["rows"][0], alone["rows"][0], rtol=1e-4)
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=1e-2)


def broken(overrides: list[str], what: str) -> dict:
    kept = pipeline.Pipeline.finish, pipeline.balanced
    try:
        if what == "tied weights":
            pipeline.Pipeline.finish = lambda *_: ()  # type: ignore[method-assign,assignment]
        else:
            pipeline.balanced = lambda count, size, at: kept[1](count, size, size - 1 - at)
        return train_steps(overrides, 3)
    finally:
        pipeline.Pipeline.finish, pipeline.balanced = kept  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["tied weights", "the order of layers"])
def test_the_comparison_sees_what_is_broken(directory: Path, what: str, world: SharedWorld) -> None:
    common = overrides(directory, "llama_tied")
    with pytest.raises(AssertionError, match="computes something else" if "order" in what else "Not equal"):
        assert_alike(world.run(broken, 2, [*common, "parallel.pp=2"], what), train_steps(common, 3))


def test_more_stages_than_layers_are_refused() -> None:
    model = build(compose(SMALL), "meta")  # of two layers
    check_stages(model, 2, ONE_F_ONE_B)
    with pytest.raises(Refused, match=r"makes 3 stages of the model's 2 layers\. Type parallel\.pp=2"):
        check_stages(model, 3, ONE_F_ONE_B)
    with pytest.raises(Refused, match=r"makes 4 stages of the model's 2 layers\. Type parallel\.pp=1"):
        check_stages(model, 2, INTERLEAVED)


def test_a_stage_without_anything_to_train_is_refused() -> None:
    for layer in (0, 1):
        adapted = ["method=lora", f"method.target_modules=[layers.{layer}.self_attn.q_proj]"]
        model = build(compose([*SMALL, *adapted]), "meta")
        with pytest.raises(Refused, match=rf"leaves process {1 - layer} of a pipeline without anything to train"):
            check_stages(model, 2, ONE_F_ONE_B)


def test_families_that_were_not_tried_in_stages_are_refused() -> None:
    model = build(compose(SMALL), "meta")
    inside(model).config.model_type = "phi"
    with pytest.raises(Refused, match=r"A phi model is not known to compute the same in stages"):
        check_stages(model, 2, ONE_F_ONE_B)


def test_what_has_no_known_stage_is_refused() -> None:
    model = build(compose(SMALL), "meta")
    base = inside(model).model
    base._modules = {"adapter": torch.nn.Linear(3, 3), **base._modules}
    with pytest.raises(Refused, match=r"A Linear comes before the layers .* Type parallel\.pp=1"):
        check_stages(model, 2, ONE_F_ONE_B)


def test_stages_share_what_they_have_and_leave_the_model_as_it_was() -> None:
    model = build(compose([*SMALL, "model.num_layers=4"]))
    before = dict(model.named_parameters())
    stages = [cut_out(inside(model), range(n, n + 2), first=n == 0, last=n == 2) for n in (0, 2)]
    held = [dict(stage.named_parameters()) for stage in stages]
    assert held[0].keys() | held[1].keys() == before.keys() and not held[0].keys() & held[1].keys()
    assert all(parameter is before[name] for stage in held for name, parameter in stage.items())
    assert dict(model.named_parameters()) == before and len(blocks(model)) == 4


def test_stages_of_a_schedule() -> None:
    assert stages_of(3, ONE_F_ONE_B) == 3 and stages_of(3, INTERLEAVED) == 6
