"""The planned memory against what a step really needs, counted tensor by tensor."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch

from tests.harness.engines import feed_for, held_by, place, training_here, windows
from tests.harness.peak import Peak
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.zoo import save_model
from trainer.compose import compose
from trainer.footprint import footprint, plan_memory
from trainer.loop import optimize
from trainer.methods import build, build_largest, method_of
from trainer.optimizers import make_optimizer
from trainer.optimizers.groups import lr_scales
from trainer.plan import MemoryPlan, Topology, plan_batch, resolve_topology


def planned_over_measured(overrides: list[str]) -> float:
    planned, measured = planned_and_measured(overrides)
    return planned / measured


def planned_and_measured(overrides: list[str]) -> tuple[int, int]:
    """In this process's world, after a first step that creates what stays."""
    config = compose(["train.global_batch=8", "train.micro_batch=2", *overrides])
    topology = resolve_topology(config.parallel, place().size)
    engine = training_here(config)
    feed = feed_for(engine, config, windows(config.train.seq_len, count=60000))
    optimize(engine, feed.step(1), 1e-3, 1)
    gc.collect()
    with Peak(held_by(engine)) as peak:
        optimize(engine, feed.step(2), 1e-3, 2)
    plan = plan_memory(
        config, footprint(config, build_largest(config)), topology, plan_batch(config, topology.data_size).rounds
    )
    return plan.total, peak.most


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.hidden_size=512", "model.intermediate_size=1376"],
        ["train.seq_len=512"],
        ["model.vocab_size=8192"],
        ["parallel.activation_checkpointing=true", "train.seq_len=512"],
        ["train.global_batch=2"],
        ["precision=bf16"],
        ["method=lora"],
        ["parallel.local_batch=1"],
    ],
    ids=lambda overrides: " ".join(overrides) or "default",
)
def test_the_plan_is_within_a_tenth_of_what_a_step_needs(overrides: list[str]) -> None:
    assert planned_over_measured(overrides) == pytest.approx(1, abs=0.1)


WIDE = ["model.hidden_size=384", "model.intermediate_size=1376", "model.num_layers=4"]
# Each with what has it select entries anew after step 2, where it does that.
METHODS = {
    **{name: [] for name in ("full", "lora", "s2ft", "random_sparse", "lt_sft", "spt", "perp_selective")},
    **{name: ["method.every=2"] for name in ("lift", "spiel_ma", "sara")},
    "spiel": ["method.every=2", "method.window=1"],
}


def planned_and_needed(method: str, layout: list[str]) -> tuple[int, int]:
    """By the steps of a run from its first one on, selections of entries among them."""
    sizes = [*WIDE, "train.global_batch=8", "train.micro_batch=2", "train.steps=4"]
    config = compose([*sizes, f"method={method}", *METHODS[method], *layout])
    topology = resolve_topology(config.parallel, place().size)
    with Peak([]) as peak:
        engine = training_here(config)
        feed = feed_for(engine, config, windows(config.train.seq_len, count=60000))
        gc.collect()
        peak.most = peak.now  # on a CPU the whole model was there meanwhile
        for step in range(1, 4):
            optimize(engine, feed.step(step), 1e-3, step)
            gc.collect()
    rounds = plan_batch(config, topology.data_size).rounds
    return plan_memory(config, footprint(config, build_largest(config)), topology, rounds).total, peak.most


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("method", METHODS)
def test_every_methods_plan_is_within_a_tenth_of_what_it_needs(method: str) -> None:
    planned, needed = planned_and_needed(method, [])
    assert planned == pytest.approx(needed, rel=0.1)


@pytest.mark.usefixtures("long")
def test_so_it_is_where_selecting_needs_more_than_a_step() -> None:
    planned, needed = planned_and_needed("lift", ["train.seq_len=32", "method.budget_rank=8"])
    assert planned == pytest.approx(needed, rel=0.1)


@pytest.mark.parametrize("layout", ["parallel=fsdp", "parallel=tp", "parallel=zero2"])
@pytest.mark.parametrize("method", METHODS)
def test_so_it_is_under_other_layouts(method: str, layout: str, world: SharedWorld) -> None:
    found = world.run(planned_and_needed, 2, method, [layout])
    assert found[0][0] == pytest.approx(max(needed for _, needed in found), rel=0.1)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, "parallel=zero3"), (2, "parallel=pp"), (3, "parallel=fsdp")],
    ids=["zero3", "pp", "fsdp on 3"],
)
@pytest.mark.parametrize("method", ["lora", "s2ft", "lift", "spiel"])
def test_so_it_is_of_each_kind_of_method(method: str, size: int, layout: str, world: SharedWorld) -> None:
    found = world.run(planned_and_needed, size, method, [layout])
    assert found[0][0] == pytest.approx(max(needed for _, needed in found), rel=0.1)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "qwen3", "gemma", "mixtral"])
def test_every_family_can_be_planned(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, name)
    ratio = planned_over_measured(["model=hf", f"model.path={tmp_path}", "train.seq_len=48"])
    assert ratio == pytest.approx(1, abs=0.2)  # of a model this small the least part is its state


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("shards", [1, 3])
def test_memory_of_the_state_is_exact(method: str, shards: int) -> None:
    config = compose([f"method={method}"])
    model = build(config)
    memory = plan_memory(config, footprint(config, build(config, "meta")), Topology(1, shards), 2)
    optimizer = make_optimizer(model, config, method_of(config), lr_scales(model, config.optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    moments = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert memory.parameters == math.ceil(sum(p.nbytes for p in model.parameters()) / shards)
    assert memory.gradients == math.ceil(gradients / shards)
    assert memory.optimizer == math.ceil(moments / shards)
    assert (memory.gathered > 0) == (shards > 1)


def test_a_full_phase_is_planned_for() -> None:
    """LT-SFT trains whole weights before it trains entries of them."""

    def planned(method: str) -> MemoryPlan:
        config = compose([f"method={method}"])
        return plan_memory(config, footprint(config, build_largest(config)), Topology(1, 1), 2)

    phases, once, whole = planned("lt_sft"), planned("random_sparse"), planned("full")
    assert 10 * once.optimizer < phases.optimizer < whole.optimizer
    assert phases.gradients == phases.optimizer // 2


@pytest.mark.parametrize(("stage", "divided"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2))])
def test_memory_of_zero_follows_its_stage(stage: int, divided: tuple[int, int]) -> None:
    config = compose([f"parallel=zero{stage}"])
    of = footprint(config, build(config, "meta"))
    memory = plan_memory(config, of, Topology(2), 2)
    assert (memory.parameters, memory.gradients) == tuple(math.ceil(of.total / n) for n in divided)
    assert memory.optimizer == math.ceil(3 * of.total / 2)  # two moments and masters
    assert (memory.gathered > 0) == (stage == 3) and memory.buckets == of.trained


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, ["parallel=ddp"]),
        (3, ["parallel=fsdp"]),
        (4, ["parallel.dp_shard=2"]),
        (2, ["parallel=fsdp", "parallel.activation_checkpointing=true"]),
        (2, ["parallel=fsdp", "method=lora"]),
        (2, ["parallel=tp"]),
        (4, ["parallel=tp", "parallel.dp_shard=2"]),
        (2, ["parallel=pp"]),
        (2, ["parallel=pp", "parallel.pp_schedule=gpipe"]),
        (2, ["parallel=pp", "parallel.pp_schedule=interleaved"]),
        (4, ["parallel=pp", "parallel.dp_shard=2"]),
        (4, ["parallel=pp", "parallel.dp_replicate=2"]),
        (4, ["parallel=tp", "parallel.dp_replicate=2"]),
        (2, ["parallel=accelerate"]),
        (2, ["parallel.engine=deepspeed"]),
        (2, ["parallel=zero1"]),
        (2, ["parallel=zero2"]),
        (2, ["parallel=zero3"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_layout_needs_within_a_tenth_of_what_is_planned(size: int, layout: list[str], world: SharedWorld) -> None:
    found = world.run(planned_and_measured, size, [*WIDE, *layout])
    most = max(measured for _, measured in found)
    assert found[0][0] == pytest.approx(most, rel=0.1)


def test_the_comparison_sees_what_a_layout_saves(world: SharedWorld) -> None:
    planned, _ = planned_and_measured(WIDE)
    (_, measured), _ = world.run(planned_and_measured, 2, [*WIDE, "parallel=fsdp"])
    assert planned != pytest.approx(measured, rel=0.1)
