"""What every engine must do alike, under every layout: one suite, run on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.engines import feed_for, place, training_here
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_torch_engine import SMALL, dataset
from tests.trainer.parallel.zoo import save_model
from trainer.compose import compose
from trainer.data.feed import Feed
from trainer.loop import optimize
from trainer.methods import build
from trainer.progress import LossScale
from trainer.training import Training

LAYOUTS = {
    "ddp": (2, ["parallel=ddp"]),
    "fsdp": (3, ["parallel=fsdp"]),
    "hsdp": (4, ["parallel.dp_shard=2"]),
    "fsdp x tp": (4, ["parallel=tp", "parallel.dp_shard=2"]),
    "pp": (2, ["parallel=pp"]),
    "pp x ddp": (4, ["parallel=pp", "parallel.dp_replicate=2"]),
    "pp, interleaved": (2, ["parallel=pp", "parallel.pp_schedule=interleaved", "model.num_layers=4"]),
    "zero 0": (2, ["parallel.engine=deepspeed"]),
    "zero 1": (2, ["parallel=zero1"]),
    "zero 2": (3, ["parallel=zero2"]),
    "zero 3": (2, ["parallel=zero3"]),
    "zero 2, offload": (2, ["parallel=zero2", "parallel.offload=true"]),
    "zero 3, offload": (2, ["parallel=zero3", "parallel.offload=true"]),
    "accelerate": (2, ["parallel=accelerate"]),
    "accelerate, zero 1, offload": (2, ["parallel=accelerate", "parallel.zero_stage=1", "parallel.offload=true"]),
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def alone_of(layout: str) -> list[str]:
    """The model that a layout needs, without the layout."""
    return [option for option in LAYOUTS[layout][1] if option.startswith("model.")]


def start(overrides: list[str]) -> tuple[Training, Feed]:
    small = [] if "model=hf" in overrides else SMALL
    config = compose(["train.seq_len=12", "train.global_batch=10", "train.micro_batch=2", *small, *overrides])
    engine = training_here(config)
    return engine, feed_for(engine, config, dataset())


def contents(engine: Training) -> dict[Any, np.ndarray]:
    return {(p.name, p.offset): p.tensor.detach().clone().numpy() for p in engine.pieces()}


def changed(before: dict[Any, np.ndarray], after: dict[Any, np.ndarray]) -> set[str]:
    return {key[0] for key in before if not np.array_equal(before[key], after[key])}


def overflows(overrides: list[str], factors: list[float]) -> list[bool]:
    """Whether the first step does, under each of these loss scales."""
    engine, feed = start(["precision=fp16", *overrides])
    return [not np.isfinite(optimize(engine, feed.step(1), 0.0, 1, LossScale(factor))[1]) for factor in factors]


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "pp x ddp", "zero 0", "zero 1", "zero 3"])
def test_a_step_overflows_at_the_same_scale_on_any_number_of_processes(layout: str, world: SharedWorld) -> None:
    size, overrides = LAYOUTS[layout]
    factors = [2.0**n for n in range(12, 32)]
    alone = overflows([], factors)
    assert any(alone) and not all(alone)
    assert world.run(overflows, size, overrides, factors) == [alone] * size


def in_fp16(overrides: list[str]) -> dict[str, Any]:
    """Three steps, the second of which overflows: what they gave, and what the second changed."""
    engine, feed = start(["precision=fp16", *overrides])
    rows = [optimize(engine, feed.step(1), 1e-2, 1, LossScale(2.0**10))]
    before = contents(engine)
    rows.append(optimize(engine, feed.step(2), 1e-2, 2, LossScale(1e38)))
    left = changed(before, contents(engine))
    rows.append(optimize(engine, feed.step(3), 1e-2, 3, LossScale(2.0**4)))
    return {"rows": rows, "left": left, "moved": changed(before, contents(engine))}


# accelerate refuses fp16 on CPUs.
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "accelerate"])
def test_fp16_with_a_loss_scale(layout: str, world: SharedWorld) -> None:
    size, overrides = LAYOUTS[layout]
    alone = in_fp16(alone_of(layout))
    assert not np.isfinite(alone["rows"][1][1]) and alone["left"] == set()
    for found in world.run(in_fp16, size, overrides):
        assert found["left"] == set() and found["moved"]  # a step that counts is seen by the same comparison
        assert not np.isfinite(found["rows"][1][1])
        np.testing.assert_allclose(found["rows"][0], alone["rows"][0], rtol=1e-3)
        np.testing.assert_allclose([row[0] for row in found["rows"]], [row[0] for row in alone["rows"]], rtol=1e-3)
        # The scale is out of the norm again: in fp32 it is much the same.
        assert found["rows"][2][1] == pytest.approx(alone["rows"][2][1], rel=0.02)


def with_two_rates(overrides: list[str]) -> dict[str, Any]:
    engine, feed = start(overrides)
    before = contents(engine)
    rows = [optimize(engine, feed.step(step), 1e-2, step) for step in (1, 2, 3)]
    return {"rows": rows, "moved": {n for n in changed(before, contents(engine)) if n.startswith("model/")}}


TWO_RATES = ["optimizer.lr_scale=[layers.0:0.0,lm_head:0.1]"]


@LAYOUT
def test_learning_rates_of_their_own(layout: str, world: SharedWorld) -> None:
    size, overrides = LAYOUTS[layout]
    model = alone_of(layout)
    alone = with_two_rates([*TWO_RATES, *model])
    assert alone["moved"] and not any("layers.0" in name for name in alone["moved"])
    assert not np.allclose(alone["rows"], with_two_rates(model)["rows"], rtol=2e-5)  # one rate for all is seen
    results = world.run(with_two_rates, size, [*TWO_RATES, *overrides])
    assert set().union(*(found["moved"] for found in results)) == alone["moved"]
    for found in results:
        np.testing.assert_allclose(found["rows"], alone["rows"], rtol=2e-5)


@pytest.mark.parametrize("layout", ["pp", "fsdp x tp", "zero 3"])
def test_a_tied_tensor_has_one_rate_under_both_names(layout: str, tmp_path: Path, world: SharedWorld) -> None:
    """A pipeline's last stage knows it by the other name only."""
    save_model(tmp_path, "llama_tied")
    size, overrides = LAYOUTS[layout]
    common = ["model=hf", f"model.path={tmp_path}", "optimizer.lr_scale=[embed_tokens:0.1]"]
    alone = with_two_rates(common)
    assert not np.allclose(alone["rows"], with_two_rates(common[:2])["rows"], rtol=2e-5)
    for found in world.run(with_two_rates, size, [*common, *overrides]):
        np.testing.assert_allclose(found["rows"], alone["rows"], rtol=2e-5)


def still_there(overrides: list[str]) -> int:
    """Elements of the whole model's parameters that live on after an engine has taken its part of them."""
    import gc
    import weakref

    config = compose(overrides)
    model = build(config)
    whole = [weakref.ref(parameter) for parameter in model.parameters()]
    engine = training_here(config, model)
    del model
    gc.collect()
    assert engine.world_size == place().size
    return sum(p.numel() for one in whole if (p := one()) is not None)


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_a_rank_lets_go_of_what_others_have(layout: str, world: SharedWorld) -> None:
    total = sum(p.numel() for p in build(compose([]), "meta").parameters())
    for left in world.run(still_there, 2, [f"parallel={layout}"]):
        assert left < (0.1 if layout == "tp" else 0.6) * total
