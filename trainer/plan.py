"""The plan of a run, worked out before anything starts: degrees, batch arithmetic, memory. Pure functions.

The plan is printed at the start; `dry_run=true` stops after it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from torch import nn

from trainer.errors import Refused
from trainer.options.config import Config, choice_of, method_name
from trainer.options.parallel import Engine, Parallel

# Every degree, from the axis whose ranks are furthest apart to the one whose ranks are neighbours, which talk most.
AXES = ("pp", "dp_replicate", "dp_shard", "tp")
TAKING_APART = ("tp", "pp", "dp_shard")  # of these: by which a process holds less than the whole model


@dataclass(frozen=True)
class Topology:
    """The parallel degrees; their product is the number of processes."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def data_size(self) -> int:
        """How many shares the global batch is dealt into."""
        return self.dp_replicate * self.dp_shard

    @property
    def size(self) -> int:
        return prod(getattr(self, axis) for axis in AXES)

    def __str__(self) -> str:
        if self.size == 1:
            return "one process"
        data = "DDP" if self.dp_shard == 1 else "FSDP2" if self.dp_replicate == 1 else "FSDP2 with replicas"
        kinds = [data] if self.data_size > 1 else []
        kinds += ["tensor parallel"] if self.tp > 1 else []
        kinds += ["pipeline"] if self.pp > 1 else []
        degrees = {name: degree for name, degree in asdict(self).items() if degree > 1 or name.startswith("dp_")}
        return f"{' and '.join(kinds)}, {' x '.join(f'{name} {degree}' for name, degree in degrees.items())}"


def resolve_topology(parallel: Parallel, world_size: int) -> Topology:
    """The degrees for this many processes. `Refused` if they cannot fill the world exactly."""
    for key, what in (("cp", "context"), ("ep", "expert")):
        if (degree := getattr(parallel, key)) != 1:
            raise Refused(
                f"parallel.{key}={degree}: {what} parallelism is not supported. "
                f"Type parallel.{key}=1 and parallel.tp={degree}."
            )
    degrees = {key: getattr(parallel, key) for key in TAKING_APART}
    rest = 1 if -1 in degrees.values() else -1
    degrees["dp_replicate"] = parallel.dp_replicate if parallel.dp_replicate is not None else rest
    for key, degree in degrees.items():
        if degree < 1 and degree != -1:
            raise Refused(
                f"parallel.{key}={degree} must be at least 1, or -1 to fill the world. Type parallel.{key}=1."
            )
    filled = [key for key, degree in degrees.items() if degree == -1]
    if len(filled) > 1:
        choices = " or ".join(f"parallel.{key}=1" for key in sorted(filled))
        raise Refused(f"Only one degree can fill the world. Type {choices}.")
    known = prod(degree for degree in degrees.values() if degree != -1)
    if world_size % known if filled else world_size != known:
        product = " x ".join(f"parallel.{key}={degree}" for key, degree in sorted(degrees.items()) if degree != -1)
        raise Refused(
            f"{product} does not {'divide' if filled else 'make up'} the {world_size} process(es) of this run. "
            f"Type {_fitting(world_size, degrees)}, or start {'a multiple of ' if filled else ''}{known} processes."
        )
    return Topology(**{key: world_size // known if degree == -1 else degree for key, degree in degrees.items()})


def _fitting(world_size: int, wanted: dict[str, int]) -> str:
    """Degrees that make up the world: each as near to what was wanted as the others leave room for."""
    found, left = {}, world_size
    for key in TAKING_APART:
        found[key] = next(n for n in range(min(max(wanted[key], 1), left), 0, -1) if left % n == 0)
        left //= found[key]
    found = {"dp_replicate": left, "dp_shard": found["dp_shard"]} | {k: found[k] for k in ("tp", "pp") if wanted[k] > 1}
    return " ".join(f"parallel.{key}={degree}" for key, degree in found.items())


@dataclass(frozen=True)
class BatchPlan:
    """The global batch as logical micro-batches, and how many rounds a process needs for its share of them."""

    global_batch: int
    micro_batch: int
    data_size: int

    @property
    def num_micro_batches(self) -> int:
        return self.global_batch // self.micro_batch

    @property
    def rounds(self) -> int:
        return -(-self.num_micro_batches // self.data_size)

    @property
    def idle(self) -> int:
        """Turns a step in which a process has nothing to compute."""
        return self.rounds * self.data_size - self.num_micro_batches


def plan_batch(config: Config, data_size: int) -> BatchPlan:
    """`Refused` only where the global batch is not a whole number of micro-batches."""
    total, micro = config.train.global_batch, config.train.micro_batch
    if total % micro:
        below, above = total // micro * micro, -(-total // micro) * micro
        nearest = " or ".join(f"train.global_batch={n}" for n in (below, above) if n > 0)
        divisor = next(n for n in range(micro, 0, -1) if total % n == 0)
        raise Refused(
            f"train.global_batch={total} is not a multiple of train.micro_batch={micro}. "
            f"Type {nearest}, or train.micro_batch={divisor}."
        )
    local = config.parallel.local_batch
    if local is not None and not 1 <= local <= micro:
        raise Refused(
            f"parallel.local_batch={local} must lie between 1 and train.micro_batch={micro}. "
            "Type parallel.local_batch=1."
        )
    return BatchPlan(total, micro, data_size)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the process that needs most while it trains."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int  # what a process has only a shard of and holds whole for a time, and its gradients
    buckets: int  # in which DeepSpeed reduces gradients
    activations: int = 0
    entries: int = 0  # where the entries lie that a sparse method trains
    selection: int = 0  # what choosing them needs beyond a step

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def describe_run(
    config: Config,
    model: nn.Module,
    topology: Topology,
    batch: BatchPlan,
    memory: MemoryPlan,
    device: str,
    optimizer: str,
) -> list[tuple[str, str]]:
    """Lines about the model, the processes, the batch, the steps and the memory: (label, text)."""
    train, schedule = config.train, config.schedule
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    idle = f", {batch.idle} of {batch.rounds * batch.data_size} turns idle" if batch.idle else ""
    parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in asdict(memory).items() if size)
    method = f"method={method_name(config)} trains {trained:,} ({trained / total:.2%})"
    split = f"{batch.num_micro_batches} micro-batches of {batch.micro_batch}, {batch.rounds} rounds a process{idle}"
    tokens = f"up to {batch.global_batch * train.seq_len:,} target tokens a step"
    parallel = config.parallel
    layout = f"DeepSpeed, ZeRO stage {parallel.zero_stage}" if parallel.uses_deepspeed else str(topology)
    layout += " (set up by accelerate)" if parallel.engine is Engine.accelerate else ""
    rate = f"lr {config.optimizer.lr:g} after {schedule.warmup_steps} steps of warm-up, then {schedule.curve.name}"
    return [
        ("model", f"{choice_of(config, 'model')}, {total:,} parameters; {method}"),
        ("processes", f"{topology.size} on {device}: {layout}; precision={config.precision.compute.name}"),
        ("batch", f"{batch.global_batch} samples = {split}; {tokens}"),
        ("steps", f"{train.steps}; {optimizer}, {rate}"),
        ("memory", f"about {_megabytes(memory.total)} a process: {parts}"),
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
