"""The engine that accelerate sets up computes and saves what the torch engine does."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

from checkpointing import Piece, load, save
from tests.harness.engines import place, training_here
from tests.harness.runs import SMALL as TINY
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_torch_engine import SMALL, dataset, train_steps, whole
from trainer.compose import compose
from trainer.data.feed import Feed
from trainer.errors import Refused
from trainer.loop import optimize
from trainer.methods import build
from trainer.options.precision import Compute
from trainer.parallel import accelerate_engine
from trainer.parallel.accelerate_engine import as_configured, prepare, topology_of
from trainer.parallel.mesh import Mesh
from trainer.parallel.world import World
from trainer.plan import Topology
from trainer.run import run
from trainer.training import Training, make_training

CPU = torch.device("cpu")
BATCH = ["train.global_batch=10", "train.micro_batch=2"]  # five micro-batches: two ranks do not divide them
METHODS = [[], ["method=lora", "method.dropout=0.2"]]


class OnGpus(accelerate.Accelerator):
    """accelerate configured for FSDP2 and standing on GPUs: on CPUs it would not shard."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin


def engine_of(overrides: list[str]) -> Training:
    """`sharded` among the overrides stands for accelerate's FSDP2."""
    config = compose([*SMALL, *BATCH, *(o for o in overrides if o != "sharded")])
    if "sharded" not in overrides:
        return training_here(config)
    world = place()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate_engine, "Accelerator", OnGpus)
        return make_training(config, build(config), Topology(dp_shard=world.size), world, CPU)


def feed_of(engine: Training) -> Feed:
    return Feed(
        dataset(), global_batch=10, micro_batch=2, seed=1, pad=0, num_ranks=engine.data_size, rank=engine.data_rank
    )


def contents(engine: Training) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    return [(p.name, p.offset, p.global_shape, p.tensor.detach().clone().numpy()) for p in held(engine)]


def held(engine: Training) -> list[Piece]:
    """Without the frozen base, of which checkpoints have the hash."""
    return [piece for piece in engine.pieces() if isinstance(piece, Piece)]


def train_and_save(overrides: list[str], directory: str) -> dict[str, Any]:
    """Three steps, what was saved, and two steps more."""
    engine = engine_of(overrides)
    feed = feed_of(engine)
    for step in range(1, 4):
        optimize(engine, feed.step(step), 1e-2, key=step)
    parts = contents(engine)
    save(directory, 3, engine.pieces())
    return {"parts": parts, "rows": [optimize(engine, feed.step(s), 1e-2, key=s) for s in (4, 5)]}


def load_and_train(overrides: list[str], directory: str, forget: bool = False) -> dict[str, Any]:
    engine = engine_of(overrides)
    feed = feed_of(engine)
    for piece in held(engine):
        piece.tensor.detach().fill_(0.5)
    load(directory, engine.pieces())
    engine.publish()
    parts = contents(engine)
    if forget:
        for piece in held(engine):
            if "/exp_avg" in piece.name:
                piece.tensor.zero_()
    return {"parts": parts, "rows": [optimize(engine, feed.step(s), 1e-2, key=s) for s in (4, 5)]}


def on(world: SharedWorld, size: int, function: Any, *arguments: Any) -> list[dict[str, Any]]:
    return world.run(function, size, *arguments) if size > 1 else [function(*arguments)]


def losses(results: list[dict[str, Any]]) -> list[list[float]]:
    return [[loss for loss, _ in result["rows"]] for result in results]


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2])
def test_it_trains_like_one_process_of_the_torch_engine(size: int, method: list[str], world: SharedWorld) -> None:
    alone = train_steps([*BATCH, *method])
    results = on(world, size, train_steps, [*BATCH, *method, "parallel=accelerate"])
    for result in results:
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=2e-5)
        assert result["eval"] == pytest.approx(alone["eval"], rel=1e-5)
    model = whole(results)
    assert set(model) == {name for name, *_ in alone["parts"]}
    for name, _, _, part in alone["parts"]:
        np.testing.assert_allclose(model[name], part, atol=3e-4, err_msg=name)


def test_bf16_computes_like_ddp_under_bf16_and_keeps_fp32_masters(world: SharedWorld) -> None:
    overrides = [*BATCH, "precision=bf16"]
    ddp, prepared = (
        world.run(train_steps, 2, [*overrides, layout]) for layout in ("parallel=ddp", "parallel=accelerate")
    )
    assert ddp[0]["rows"] == prepared[0]["rows"]
    assert all(part.dtype == np.float32 for *_, part in prepared[0]["parts"])


def sharded_steps(overrides: list[str]) -> dict[str, Any]:
    engine = engine_of(["parallel=accelerate", "sharded", *overrides])
    feed = feed_of(engine)
    rows = [optimize(engine, feed.step(s), 1e-2, key=s) for s in range(1, 5)]
    return {"rows": rows, "parts": [part for part in contents(engine) if part[0].startswith("model/")]}


@pytest.mark.parametrize("method", [*METHODS, ["precision=bf16"]])
def test_its_fsdp2_trains_like_one_process_of_the_torch_engine(method: list[str], world: SharedWorld) -> None:
    alone = train_steps([*BATCH, *method])
    results = world.run(sharded_steps, 3, method)
    for result in results:
        if "precision=bf16" in method:  # then rounding drifts apart
            np.testing.assert_allclose(result["rows"][0], alone["rows"][0], rtol=1e-4)
        else:
            np.testing.assert_allclose(result["rows"], alone["rows"], rtol=2e-5)
        size, of = (sum(part[3].size for part in parts) for parts in (result["parts"], alone["parts"]))
        assert size < 0.4 * of
    assert set(whole(results)) == {name for name, *_ in alone["parts"]}


CHANGES = [
    pytest.param(2, ["parallel=accelerate"], 3, ["parallel=fsdp"], id="accelerate-fsdp"),
    pytest.param(2, ["parallel=accelerate"], 1, [], id="accelerate-one"),
    pytest.param(3, ["parallel=fsdp"], 2, ["parallel=accelerate"], id="fsdp-accelerate"),
    pytest.param(1, [], 2, ["parallel=accelerate"], id="one-accelerate"),
    pytest.param(3, ["parallel=accelerate", "sharded"], 2, ["parallel=accelerate"], id="sharded-accelerate"),
    pytest.param(2, ["parallel=ddp"], 3, ["parallel=accelerate", "sharded"], id="ddp-sharded"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "before", "new_size", "after"), CHANGES)
def test_a_checkpoint_does_not_know_which_engine_wrote_it(
    size: int, before: list[str], new_size: int, after: list[str], method: list[str], tmp_path: Path, world: SharedWorld
) -> None:
    saved = on(world, size, train_and_save, [*before, *method], str(tmp_path))
    loaded = on(world, new_size, load_and_train, [*after, *method], str(tmp_path))
    there, here = whole(saved), whole(loaded)
    assert there.keys() == here.keys()
    assert any(name.endswith("/exp_avg_sq") for name in there)
    for name in there:
        np.testing.assert_array_equal(there[name], here[name], err_msg=name)
    for found in losses(loaded):
        np.testing.assert_allclose(found, losses(saved)[0], rtol=0, atol=1e-5)
    # The comparison can fail: without the moments the step after the load goes elsewhere.
    forgotten = on(world, new_size, partial(load_and_train, forget=True), [*after, *method], str(tmp_path))
    assert not np.allclose(losses(forgotten)[0], losses(saved)[0], rtol=0, atol=1e-5)


def first_losses(directory: str) -> list[float]:
    """Of an engine that was loaded, of one built of the same tensors, and of one with others."""
    batches = [micro_batch for _, micro_batch in feed_of(engine_of([])).step(4).micro_batches]
    loaded = engine_of(["parallel=accelerate", "train.seed=9"])
    load(directory, loaded.pieces())
    loaded.publish()
    config = compose([*SMALL, *BATCH, "parallel=accelerate"])
    model = build(config)
    model.load_state_dict({p.name.removeprefix("model/"): p.tensor for p in loaded.pieces() if "model/" in p.name})
    fresh = training_here(config, model)
    other = engine_of(["parallel=accelerate", "train.seed=9"])
    return [float(engine.loss(batches)) for engine in (loaded, fresh, other)]


def test_the_first_forward_after_a_load_is_that_of_a_fresh_engine(tmp_path: Path, world: SharedWorld) -> None:
    world.run(train_and_save, 3, ["parallel=fsdp"], str(tmp_path))
    for loaded, fresh, other in world.run(first_losses, 2, str(tmp_path)):
        assert loaded == fresh != other


def alone_under_a_launcher() -> tuple[bool, bool]:
    rows = train_steps([*BATCH, "parallel=accelerate"], 1)["rows"]
    return dist.is_initialized(), rows == train_steps(BATCH, 1)["rows"]


def test_a_single_process_of_a_launcher_joins_no_process_group(world: SharedWorld) -> None:
    assert world.run(alone_under_a_launcher, 1, environment=True) == [(False, True)]


def test_nothing_of_accelerate_outlives_its_work_and_a_world_that_differs_is_refused() -> None:
    with pytest.raises(Refused, match="set up"):
        prepare(torch.nn.Linear(2, 2), Mesh(Topology(dp_replicate=2), 0, None), CPU, compute=Compute.fp32)
    assert AcceleratorState._shared_state == PartialState._shared_state == {}
    prepare(torch.nn.Linear(2, 2), Mesh(Topology(), 0, None), CPU, compute=Compute.fp32)
    assert AcceleratorState._shared_state == PartialState._shared_state == {}


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED = [
    ([], {"ACCELERATE_USE_MEGATRON_LM": "true"}, "cpu", "parallel=tp"),
    ([], {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "cuda", "parallel.dp_shard"),
    ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "cpu", "gradient_accumulation_steps: 1"),
    ([], {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "cpu", "--dynamo_backend no"),
    ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}, "cpu", "Type precision=bf16, or start with --mixed_precision no"),
    (["precision=bf16"], {"ACCELERATE_MIXED_PRECISION": "no"}, "cpu", "precision=fp32, or .* --mixed_precision bf16"),
    (["precision=bf16"], {"ACCELERATE_MIXED_PRECISION": "fp8"}, "cpu", "Start with --mixed_precision bf16"),
    ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "cpu", "Type precision=fp16, or start with --mixed_precision no"),
    (["precision=fp16"], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "cpu", "Type precision=bf16, or parallel=ddp"),
    ([], {"ACCELERATE_USE_CPU": "True"}, "cuda", "CUDA_VISIBLE_DEVICES="),
    ([], {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "cpu", "--multi_gpu --num_processes N"),
    ([], {"OMPI_COMM_WORLD_SIZE": "2"}, "cpu", "--multi_gpu --num_processes N"),
    ([], FSDP, "cpu", "parallel=fsdp"),
    ([], {**FSDP, "FSDP_VERSION": "1"}, "cuda", "fsdp_version: 2"),
    ([], {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "cuda", "fsdp_offload_params: false"),
    ([], {**FSDP, "FSDP_IGNORED_MODULES": "lm_head"}, "cuda", "fsdp_ignored_modules"),
    (["parallel.tp=2"], {}, "cpu", "parallel.tp=1, or parallel.engine=torch"),
    (["parallel.pp=2"], {}, "cpu", "parallel.pp=1"),
    (["parallel.dp_shard=2"], {}, "cpu", "parallel.dp_shard=1"),
    (["parallel.dp_replicate=2"], FSDP, "cuda", "parallel.dp_replicate=1"),
    ([], {**ZERO, "ACCELERATE_USE_CPU": "true"}, "cpu", "Leave --cpu out"),
    ([], {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "cpu", "parallel.engine=deepspeed"),
    (["parallel.zero_stage=3"], ZERO, "cpu", "zero_stage 2, and this command parallel.zero_stage=3. Type 2"),
    (["parallel.zero_stage=2"], {"ACCELERATE_MIXED_PRECISION": "no"}, "cpu", "--use_deepspeed --zero_stage 2"),
    (
        [],
        {**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "0.5"},
        "cpu",
        "gradient_clipping 0.5.* optimizer.clip=1.0. Type 0.5",
    ),
    ([], {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "cpu", "offload_optimizer_device: none"),
    ([], {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "cpu", "offload_param_device: none"),
    ([], {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, "cpu", "nowhere.json cannot be read"),
    (["parallel.tp=2"], ZERO, "cpu", "parallel.tp=1"),
]


@pytest.mark.parametrize(("overrides", "environment", "device", "remedy"), REFUSED)
def test_what_contradicts_is_refused_with_what_to_type(
    overrides: list[str], environment: dict[str, str], device: str, remedy: str
) -> None:
    config = compose(["parallel=accelerate", *overrides])
    with pytest.raises(Refused, match=remedy):
        topology_of(as_configured(config, environment), World(0, 2, 0, 2), torch.device(device), environment)


def test_deepspeeds_stage_and_offload_are_what_accelerate_is_configured_for(tmp_path: Path) -> None:
    config = compose(["parallel=accelerate"])
    assert as_configured(config, {}) is config
    given = {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    parallel = as_configured(config, given).parallel
    assert (parallel.zero_stage, parallel.offload, parallel.deepspeed) == (2, True, None)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}')
    given = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    configured = as_configured(config, given)
    parallel = configured.parallel
    assert (parallel.zero_stage, parallel.offload, parallel.deepspeed) == (3, False, str(tmp_path / "ds.json"))
    assert topology_of(configured, World(0, 2, 0, 2), CPU, given) == Topology(dp_replicate=2)


ZERO_STAGES = [["parallel.zero_stage=1"], ["parallel.zero_stage=2"], ["parallel.zero_stage=3", "method=lora"]]


@pytest.mark.parametrize("stage", ZERO_STAGES)
def test_its_deepspeed_trains_like_one_process_and_is_gone_afterwards(stage: list[str], world: SharedWorld) -> None:
    method = stage[1:]
    alone = train_steps([*BATCH, *method])
    for result in world.run(with_deepspeed, 2, [*BATCH, *stage]):
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=2e-5)
        assert result["engine"] == ("DeepSpeedEngine", int(stage[0][-1])) and result["left"] == {}
    assert not np.allclose(train_steps([*BATCH, *method, "optimizer.clip=0.05"])["rows"], alone["rows"], rtol=2e-5)


def with_deepspeed(overrides: list[str]) -> dict[str, Any]:
    """As under `accelerate launch`, which says a stage in the environment as well, and which keys of a file it read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        patch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_multinode_launcher,zero_stage,mixed_precision")
        before = dict(os.environ)
        found = train_steps([*overrides, "parallel=accelerate"])
        engine = engine_of([*overrides, "parallel=accelerate"])
        changed = {key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)}
    made: Any = engine.engine._engine  # type: ignore[attr-defined]
    stage = made.zero_optimization_stage()
    return {
        **found,
        "engine": (type(made).__name__, stage),
        "left": {**AcceleratorState._shared_state, **dict.fromkeys(key for key in changed if "ACCELERATE" in key)},
    }


def test_the_degrees_are_what_accelerate_is_configured_for() -> None:
    config, two = compose(["parallel=accelerate", "precision=bf16"]), World(0, 2, 0, 2)
    agreed = {"ACCELERATE_MIXED_PRECISION": "bf16", "MASTER_PORT": "29500", "RANK": "0"}
    assert topology_of(config, two, CPU, agreed) == Topology(dp_replicate=2)
    assert topology_of(config, two, CPU, {}) == Topology(dp_replicate=2)
    assert topology_of(config, two, torch.device("cuda", 0), {**agreed, **FSDP}) == Topology(dp_shard=2)
    assert topology_of(config, World(), CPU, FSDP) == Topology()  # one process has nothing to shard with


def test_a_run_is_refused_before_anything_starts(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(Refused, match="parallel=tp"):
        run(compose([*TINY, "parallel=accelerate"]))
    assert not list(in_tmp.iterdir())
