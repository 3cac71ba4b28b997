"""The engine that Hugging Face accelerate sets up, as `accelerate launch` configured it: DDP, FSDP2 on GPUs, DeepSpeed.

accelerate prepares the model and nothing else. How a step is computed, the optimizer, the data and the checkpoints are
those of the torch engine and of DeepSpeed's, so a run may change between them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, patch_environment
from torch import nn

from trainer.errors import Refused
from trainer.options.config import Config
from trainer.options.parallel import Parallel
from trainer.options.precision import Compute
from trainer.parallel.computing import MakeOptimizer
from trainer.parallel.deepspeed_engine import DeepSpeedEngine
from trainer.parallel.deepspeed_options import check_deepspeed, read_options
from trainer.parallel.mesh import Mesh
from trainer.parallel.torch_engine import TorchEngine
from trainer.parallel.world import World
from trainer.plan import Topology

# What accelerate's configuration, which `accelerate launch` hands on in the environment, must not ask for.
_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM. Type parallel=tp instead of parallel=accelerate",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config. Leave parallel=accelerate out and type "
    "parallel.dp_replicate, parallel.dp_shard and parallel.tp",
}
_MIXED_PRECISION = {Compute.fp32: "no", Compute.bf16: "bf16", Compute.fp16: "fp16"}
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def as_configured(config: Config, environment: Mapping[str, str] = os.environ) -> Config:
    """Take over what accelerate's configuration says of DeepSpeed. `Refused` where this command says otherwise."""
    parallel = config.parallel
    if not _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        if parallel.uses_deepspeed and "ACCELERATE_MIXED_PRECISION" in environment:
            raise Refused(
                f"parallel.zero_stage={parallel.zero_stage}, and accelerate's configuration does not ask for "
                f"DeepSpeed. Start with --use_deepspeed --zero_stage {parallel.zero_stage}, or leave it out."
            )
        return config
    stage, offload, path = _deepspeed_in(environment)
    if stage == 0:
        raise Refused(
            "accelerate's configuration asks for DeepSpeed's stage 0, which shards nothing. Take DeepSpeed out of it, "
            "or type parallel.engine=deepspeed instead of parallel=accelerate."
        )
    if (given := environment.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()) not in ("none", "auto"):
        _check_equal("gradient_clipping", float(given), config.optimizer.clip, "optimizer.clip")
    for key, there in (("zero_stage", stage), ("offload", offload), ("deepspeed", path)):
        if (here := getattr(parallel, key)) not in (0, False, None):
            _check_equal(key, there, here, f"parallel.{key}")
    return replace(config, parallel=replace(parallel, zero_stage=stage, offload=offload, deepspeed=path))


def _check_equal(what: str, there: object, here: object, option: str) -> None:
    if there != here:
        raise Refused(
            f"accelerate's configuration says {what} {there}, and this command {option}={here}. Type {there}."
        )


def _deepspeed_in(environment: Mapping[str, str]) -> tuple[int, bool, str | None]:
    """The stage, whether optimizer state is on the CPU, and the path of a JSON of DeepSpeed's own options."""
    said = {
        key: environment.get(f"ACCELERATE_DEEPSPEED_{key}", "none").lower()
        for key in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE")
    }
    for key, device in said.items():
        if device == "nvme" or (key == "OFFLOAD_PARAM_DEVICE" and device != "none"):
            raise Refused(
                f"accelerate's configuration says {key.lower()} {device}, and checkpoints know of optimizer state on "
                f"the CPU only. Set {key.lower()}: none."
            )
    if (names := environment.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "none")).lower() != "none":
        raise Refused(f"accelerate's configuration names layers of experts ({names}). Take them out of it.")
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
        return stage, said["OFFLOAD_OPTIMIZER_DEVICE"] == "cpu", None
    zero = read_options(Path(path)).get("zero_optimization", {})
    return int(zero.get("stage", 0)), zero.get("offload_optimizer", {}).get("device") == "cpu", path


def make_accelerate_engine(
    config: Config,
    model: nn.Module,
    topology: Topology,
    world: World,
    device: torch.device,
    make_optimizer: MakeOptimizer,
) -> TorchEngine | DeepSpeedEngine:
    if config.parallel.uses_deepspeed:
        return DeepSpeedEngine(config, model, topology, world, device, make_optimizer, initialize_by=initialize)
    distribute_by = partial(prepare, compute=config.precision.compute)
    return TorchEngine(config, model, topology, world, device, make_optimizer, distribute_by=distribute_by)


def topology_of(
    config: Config, world: World, device: torch.device, environment: Mapping[str, str] = os.environ
) -> Topology:
    """The degrees that accelerate's configuration asks for. `Refused` where this engine or these options differ."""
    _check_started(environment)
    for key, what in _UNSUPPORTED.items():
        if _is_on(environment, key):
            raise Refused(f"accelerate's configuration asks for {what}.")
    if (steps := environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise Refused(
            f"accelerate's configuration accumulates gradients over {steps} steps, and here the batch says how often: "
            "set gradient_accumulation_steps: 1, and type train.global_batch and train.micro_batch."
        )
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise Refused(
            f"accelerate's configuration compiles the model ({backend}), and compiled layers would draw other dropout. "
            "Start with --dynamo_backend no, and type parallel.compile=true."
        )
    if device.type == "cpu" and config.precision.compute is Compute.fp16:
        raise Refused("accelerate computes in fp16 on GPUs only. Type precision=bf16, or parallel=ddp.")
    _check_precision(config.precision.compute, environment.get("ACCELERATE_MIXED_PRECISION"))
    if device.type != "cpu" and _is_on(environment, "ACCELERATE_USE_CPU"):
        raise Refused(
            "accelerate's configuration says CPU, and this machine has GPUs. Put CUDA_VISIBLE_DEVICES= in front."
        )
    if config.parallel.uses_deepspeed:
        topology = Topology(dp_replicate=world.size)
        _check_degrees(config.parallel, topology)
        if _is_on(environment, "ACCELERATE_USE_CPU"):
            raise Refused(
                "accelerate's configuration says CPU, where accelerate would train whole copies without DeepSpeed and "
                "without a word. Leave --cpu out: DeepSpeed takes the CPU where there is nothing else."
            )
        check_deepspeed(config, topology)
        return topology
    shards = _is_on(environment, "ACCELERATE_USE_FSDP") and world.size > 1
    if shards:
        _check_sharding(device, environment)
    topology = Topology(dp_shard=world.size) if shards else Topology(dp_replicate=world.size)
    _check_degrees(config.parallel, topology)
    return topology


def prepare(model: nn.Module, mesh: Mesh, device: torch.device, *, compute: Compute) -> nn.Module:
    """The model as accelerate wraps it, in the process group that is already there."""
    # A launcher's single process would join a process group of its own, which nothing here leaves again.
    alone = {"LOCAL_RANK": -1} if mesh.topology.size == 1 else {}
    with _nothing_left_of_accelerate():
        with patch_environment(**alone):
            accelerator = Accelerator(
                mixed_precision=_MIXED_PRECISION[compute],
                cpu=device.type == "cpu",
                kwargs_handlers=[
                    # Buffers are the same on all ranks from the start; each forward would send them once more.
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
                ],
            )
        _check_agreement(accelerator, mesh, device)
        if not accelerator.is_fsdp2:
            with warnings.catch_warnings():  # torch 2.13 renamed that option, and accelerate has the old name
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                return accelerator.prepare(model)  # type: ignore[no-any-return]
        # Shards stay fp32 as in every layout, and bf16 is autocast; accelerate would gather and reduce in bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        # It shards a model only together with an optimizer. Ours is built of what comes out.
        stand_in = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
        sharded, _ = accelerator.prepare(model, stand_in)
        return sharded  # type: ignore[no-any-return]


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> Any:
    """DeepSpeed's engine as accelerate makes it of our options, which hold those of its configuration."""
    with _nothing_left_of_accelerate():
        for key in list(os.environ):  # it would take them beside the options, and refuse both
            if key.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS")):
                del os.environ[key]
        plugin = DeepSpeedPlugin(hf_ds_config=options, zero3_init_flag=False)
        # bf16 and fp16 are autocast inside of the model, as in every layout.
        accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin)
        assert accelerator.distributed_type is DistributedType.DEEPSPEED
        engine, _ = accelerator.prepare(model, optimizer)
        return engine


@contextmanager
def _nothing_left_of_accelerate() -> Iterator[None]:
    """accelerate keeps its state for the whole process, and writes into the environment what it was given.

    Here none outlives the context, so that another run finds none.
    """
    before = {key: value for key, value in os.environ.items() if key.startswith("ACCELERATE_")}
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
            del os.environ[key]
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)


def _is_on(environment: Mapping[str, str], key: str) -> bool:
    return environment.get(key, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _check_started(environment: Mapping[str, str]) -> None:
    """Refuse several processes on CPUs of which `accelerate launch --cpu` starts one: the others are MPI's to start."""
    several = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    several |= any(int(environment.get(key, "1")) > 1 for key in _MPI_SIZES)
    if several and "RANK" not in environment:
        raise Refused(
            "`accelerate launch --cpu` leaves several processes to MPI, from which this trainer takes no ranks. Start "
            "with `accelerate launch --multi_gpu --num_processes N`, which starts N processes on CPUs as well, or with "
            "`python -m launch local --nproc N -- parallel=accelerate`."
        )


def _check_precision(compute: Compute, configured: str | None) -> None:
    """Nothing is configured where torchrun or `python -m launch` started the processes."""
    if configured in (None, _MIXED_PRECISION[compute]):
        return
    there = {name: ours for ours, name in _MIXED_PRECISION.items()}.get(configured)
    remedy = (
        f"Type precision={there.name}, or start" if there else f"mixed_precision {configured} is not trained. Start"
    )
    raise Refused(
        f"accelerate's configuration says mixed_precision {configured}, and this command precision={compute.name}. "
        f"{remedy} with --mixed_precision {_MIXED_PRECISION[compute]}."
    )


def _check_sharding(device: torch.device, environment: Mapping[str, str]) -> None:
    if device.type == "cpu":
        raise Refused(
            "accelerate's configuration asks for FSDP, and on CPUs accelerate would train whole copies without a word. "
            "Type parallel=fsdp instead of parallel=accelerate, or take FSDP out of accelerate's configuration."
        )
    if (version := environment.get("FSDP_VERSION", "1")) != "2":
        raise Refused(f"accelerate's configuration asks for FSDP {version}. Set fsdp_version: 2.")
    if _is_on(environment, "FSDP_OFFLOAD_PARAMS"):
        raise Refused("accelerate's configuration keeps shards on the CPU. Set fsdp_offload_params: false.")
    if environment.get("FSDP_IGNORED_MODULES"):
        raise Refused("accelerate's configuration leaves modules out of FSDP. Take fsdp_ignored_modules out of it.")


def _check_degrees(parallel: Parallel, topology: Topology) -> None:
    for key in ("tp", "pp", "cp", "ep", "dp_shard"):
        if (degree := getattr(parallel, key)) != 1:
            raise Refused(
                f"parallel.{key}={degree} is not for parallel.engine=accelerate, whose layout is what accelerate is "
                f"configured for. Type parallel.{key}=1, or parallel.engine=torch."
            )
    if parallel.dp_replicate not in (None, -1, topology.dp_replicate):
        raise Refused(
            f"parallel.dp_replicate={parallel.dp_replicate}, and accelerate is configured for {topology}. "
            f"Type parallel.dp_replicate={topology.dp_replicate}."
        )


def _check_agreement(accelerator: Accelerator, mesh: Mesh, device: torch.device) -> None:
    """Refuse a set-up of accelerate's other than planned: its collectives would wait for ever."""
    sharded = accelerator.distributed_type is DistributedType.FSDP
    found = (accelerator.num_processes, accelerator.device.type, sharded)
    planned = (mesh.topology.size, device.type, mesh.topology.dp_shard > 1)
    if found != planned:
        raise Refused(
            f"accelerate set up (processes, device, FSDP) {found} where the launcher gave {planned}. "
            "Start with `accelerate launch` or `python -m launch local`, and set no ACCELERATE_ variables by hand."
        )
