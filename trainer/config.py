"""Every option of the trainer: a typed field, its default and its help in one place; and a configuration as JSON.

Hydra composes these dataclasses, and those of choices.py, from `conf/`; check.py refuses what cannot be meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, Optional

from omegaconf import OmegaConf

from trainer.choices import CHOICES, SECRET, Data, Launch, Method, Model, option

# OmegaConf reads these annotations at run time and knows Optional[int], not int | None.


@dataclass
class Run:
    name: str = "main"
    dir: str = "runs/${run.name}"  # everything a run writes, relative to where it is started


@dataclass
class Train:
    steps: int = option(800, low=1)  # optimizer steps of the whole run
    epochs: Optional[float] = None  # passes over the data; where given, steps follow from it
    global_batch: int = option(8, low=1)  # samples a step, on any number of processes
    micro_batch: int = option(2, low=1)  # samples computed at a time: the unit that never changes with the layout
    seq_len: int = option(128, low=1)  # target tokens a sample at most
    seed: int = option(0, low=0)  # weights, order of samples and dropout all follow from it
    profile: str = ""  # FIRST:LAST steps that torch's profiler records, into run.dir/profile
    deterministic: bool = False  # refuse kernels whose result varies from run to run (slower on GPUs)


@dataclass
class Eval:
    every: int = option(100, low=0)  # steps; 0: never. The last step is always evaluated
    patience: int = option(0, low=0)  # evaluations in a row without a better loss, after which the run ends; 0: never
    samples: int = option(128, low=0)  # held-out samples, spread evenly; 0: all of them
    sets: list[str] = field(default_factory=list)  # NAME@KIND:PATH, as data.sources has them; each apart
    generate_tokens: int = option(160, low=0)  # length of the text sampled at the end; 0: none
    generate_every: int = option(0, low=0)  # steps between such texts on the way; 0: at the end only


class Implementation(Enum):
    fused = "fused"  # torch's
    foreach = "foreach"  # torch's: many tensors at a time, with temporaries of their size
    torchao_8bit = "torchao_8bit"  # moments of 8 bits (Dettmers et al. 2022, arXiv:2110.02861)


@dataclass
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    implementation: Implementation = Implementation.fused
    lr: float = option("${method.lr}", low=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = option(1e-8, low=0)
    weight_decay: float = option("${method.weight_decay}", low=0)  # on matrices only, not on norms and biases
    lr_scale: list[str] = field(default_factory=list)  # pattern:factor, of lr for names that match; the first counts
    clip: float = option(1.0, low=0)  # largest norm of the whole gradient; 0: no clipping

    @property
    def made_by(self) -> str:
        """MODULE:CLASS of the kind of optimizer."""
        low = self.implementation is Implementation.torchao_8bit
        return "trainer.optimizers.adamw_8bit:EightBitKind" if low else "trainer.optimizers.adamw:AdamWKind"


class Curve(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class Schedule:
    curve: Curve = Curve.cosine
    warmup_steps: int = option(50, low=0)  # linear from zero
    final: float = option(0.1, low=0, high=1)  # of optimizer.lr, at the last step


class Engine(Enum):
    torch = "torch"
    accelerate = "accelerate"
    deepspeed = "deepspeed"


PipelineSchedule = Enum("PipelineSchedule", ["gpipe", "1f1b", "interleaved"])


@dataclass
class Parallel:
    """Degrees multiply to the number of processes; -1 in at most one place fills the world."""

    engine: Engine = Engine.torch
    dp_replicate: Optional[int] = None  # whole copies (DDP); unset: -1, or 1 where dp_shard is -1
    dp_shard: int = 1  # ways to shard parameters, gradients and optimizer (FSDP2)
    tp: int = 1  # ways to split the heads, the inner width and the vocabulary of every layer (tensor parallel)
    pp: int = 1  # stages that the layers are dealt to (pipeline parallel)
    cp: int = 1  # context parallel: not supported yet
    ep: int = 1  # expert parallel: not supported yet
    pp_schedule: PipelineSchedule = PipelineSchedule["1f1b"]  # interleaved: two stages a process
    activation_checkpointing: bool = False  # compute a layer's forward again in its backward, rather than keep it
    compile: bool = False  # layers, by torch.compile; the first steps take longer
    compile_backend: str = "inductor"  # of torch.compile
    auto: bool = False  # choose the degrees by the memory of model and device; those given are not looked at
    local_batch: Optional[int] = None  # samples in memory at a time; splits a micro-batch, not its result
    zero_stage: int = option(0, low=0, high=3)  # DeepSpeed shards the optimizer (1), gradients (2), parameters (3)
    offload: bool = False  # DeepSpeed keeps the optimizer's state, and updates, in CPU memory (zero_stage 1 to 3)
    deepspeed: Any = (
        None  # DeepSpeed's own options, as far as they do not contradict ours: {option: value}, or a JSON file
    )

    @property
    def uses_deepspeed(self) -> bool:
        """By its own engine, or as accelerate sets it up."""
        return self.engine is Engine.deepspeed or (self.engine is Engine.accelerate and self.zero_stage > 0)


class Compute(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"  # with a dynamic loss scale


@dataclass
class Precision:
    compute: Compute = Compute.fp32  # of matrix products; parameters and optimizer stay fp32 masters


@dataclass
class Memory:
    """Snapshots in CPU memory, kept by a process of their own when the trainer dies."""

    every: int = option(0, low=0)  # steps; 1: every step; 0: none, and what is durable is saved while training waits
    dir: str = ""  # on a tmpfs, of this user alone; empty: a directory of the run under /dev/shm
    keep_s: float = option(3600, low=1)  # seconds that the memory stays when the run does not come back
    start_s: float = option(60, low=1)  # that the process that keeps it may take to start
    flush_rate: float = option(0, low=0)  # bytes a second at most from memory to checkpoint.dir; 0: as fast as it goes
    check_fence: bool = False  # find writes to the state while it is copied, at twice the price of a snapshot


@dataclass
class Checkpoint:
    dir: str = "${run.dir}/checkpoints"
    every: int = option(100, low=0)  # steps; 0: only after the last
    keep: int = option(2, low=1)  # newest generations that stay
    keep_every: int = option(0, low=0)  # and those of every so many steps, for ever; 0: none
    keep_best: int = option(0, low=0)  # and so many of the lowest held-out loss, of those saved where it was evaluated
    fail_after: int = option(0, low=0)  # durable saves that fail in a row and end the run; 0: it goes on without them
    check_replicas: bool = True  # compare what several ranks hold before it becomes durable
    memory: Memory = field(default_factory=Memory)


@dataclass
class Elastic:
    """How long others are waited for, and what happens when machines will be taken away."""

    grace_s: float = option(30, low=0)  # from the warning to the end: time to finish a step and to save it
    signal: str = "USR1"  # warns, as SIGTERM always does
    timeout_s: float = option(600, low=1)  # of a collective of the training, and of a process that says nothing
    patience_s: float = option(3600, low=1)  # that one may move no byte while it saves or loads: its storage hangs
    join_s: float = option(600, low=1)  # that machines may take to meet, where several are started by torchrun


class Tracker(Enum):
    wandb = "wandb"
    tensorboard = "tensorboard"
    none = "none"


@dataclass
class Tracking:
    tracker: Tracker = Tracker.wandb
    project: str = "evershard"
    print_every: int = option(20, low=1)  # steps between lines, where the output is not a terminal
    peak_tflops: float = option(0, low=0)  # of one device, for mfu; 0: by its name, where that is known


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    method: Method = field(default_factory=Method)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    elastic: Elastic = field(default_factory=Elastic)
    tracking: Tracking = field(default_factory=Tracking)
    launch: Launch = field(default_factory=Launch)
    resume: str = "auto"  # auto: go on with run.dir if it holds something; none: start over; or a path to go on from
    resume_allow: list[str] = field(default_factory=list)  # keys that may differ although they alter the result
    dry_run: bool = False  # print the plan and stop


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train": {"steps": 3}}` as `{"train.steps": 3}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def as_json(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, enumerations by name; of what may be secret only how much there is."""

    def plain(value: Any, key: str = "") -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name), f"{key}.{f.name}".lstrip(".")) for f in fields(value)}
        if key in SECRET:
            return ["(not recorded)"] * len(value)
        if isinstance(value, Enum):
            return value.name
        return list(value) if isinstance(value, list | tuple) else value

    return {**plain(config), "choices": {group: choice_of(config, group) for group in CHOICES}}


def from_json(saved: dict[str, Any]) -> Config:
    """What `as_json` gave, as a checkpoint holds it; options that a later release added have their defaults.

    It may be a stranger's: text stays text, also where it looks like an interpolation. `ValueError`, `TypeError`,
    `KeyError`, `AttributeError` or an error of OmegaConf's where it is no configuration.
    """
    first = {group: next(iter(known)) for group, known in CHOICES.items()}  # of groups that a later release added
    choices = {group: CHOICES[group][name]() for group, name in {**first, **saved["choices"]}.items()}
    plain = {key: _literal(value) for key, value in saved.items() if key != "choices"}
    merged = OmegaConf.merge(OmegaConf.structured(Config(**choices)), plain)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _literal(value: Any) -> Any:
    """With `${` escaped, so that it stands for itself."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _literal(one) for key, one in value.items()}
    return [_literal(one) for one in value] if isinstance(value, list) else value


def as_yaml(config: Config) -> str:
    """The resolved configuration, for a person."""
    return OmegaConf.to_yaml(OmegaConf.create(as_json(config)))


def choice_of(config: Config, group: str) -> str:
    """Which choice of a group was composed, such as `lora` for method."""
    chosen = type(getattr(config, group))
    return next(name for name, schema in CHOICES[group].items() if schema is chosen)


def method_name(config: Config) -> str:
    """The published method that was composed, where several have the same options; else the choice."""
    return str(getattr(config.method, "name", choice_of(config, "method")))
