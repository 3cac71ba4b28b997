"""Every option of the trainer: a typed field, its default and its help in one place, and the checks across fields.

Hydra composes these dataclasses from `conf/`; `from_hydra` turns the result into plain objects at the door, and no
DictConfig travels further.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from enum import Enum
from math import isfinite
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from trainer.elastic.preemption import warnings_of
from trainer.errors import Refused

# OmegaConf reads these annotations at run time and knows Optional[int], not int | None.


def option(default: Any, low: float, high: float = float("inf")) -> Any:
    """A number with its default and its bounds, both included."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class Run:
    name: str = "main"
    dir: str = "runs/${run.name}"  # everything a run writes, relative to where it is started


@dataclass
class Train:
    steps: int = option(800, low=1)  # optimizer steps of the whole run
    global_batch: int = option(8, low=1)  # samples a step, on any number of processes
    micro_batch: int = option(2, low=1)  # samples computed at a time: the unit that never changes with the layout
    seq_len: int = option(128, low=1)  # target tokens a sample at most
    seed: int = option(0, low=0)  # weights, order of samples and dropout all follow from it
    deterministic: bool = False  # refuse kernels whose result varies from run to run (slower on GPUs)


@dataclass
class Eval:
    every: int = option(100, low=0)  # steps; 0: never. The last step is always evaluated
    samples: int = option(128, low=0)  # held-out samples, spread evenly; 0: all of them
    generate_tokens: int = option(160, low=0)  # length of the text sampled at the end; 0: none


@dataclass
class Model:
    lr: float = MISSING  # the learning rate that suits this model, where optimizer.lr is not given


@dataclass
class TinyLlama(Model):
    """A Llama of about three million parameters with random weights and one token a byte."""

    lr: float = option(1e-3, low=0)
    hidden_size: int = option(256, low=1)
    intermediate_size: int = option(688, low=1)
    num_layers: int = option(4, low=1)
    num_heads: int = option(8, low=1)
    num_kv_heads: int = option(4, low=1)
    vocab_size: int = option(256, low=256)  # at least one token a byte
    dropout: float = option(0.0, low=0, high=1)  # on attention weights


@dataclass
class HuggingFace(Model):
    """Any causal language model of the Hugging Face hub or a local directory, with its tokenizer."""

    lr: float = option(2e-5, low=0)
    path: str = MISSING  # a local directory or a hub id such as meta-llama/Llama-3.2-1B
    revision: Optional[str] = None  # of a hub id: a branch, tag or commit
    trust_remote_code: bool = False  # run code that comes with the model


@dataclass
class Data:
    log_ids: bool = False  # write the ids of the samples that each step consumed into metrics.jsonl


@dataclass
class Stdlib(Data):
    """The source of the running Python's standard library."""


@dataclass
class Text(Data):
    path: str = MISSING  # a UTF-8 file, or a directory whose files match `pattern`
    pattern: str = "**/*.txt"
    eval_path: Optional[str] = None  # held-out text, like `path`; without it the tail of `path` is held out
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how much of the tail


@dataclass
class Jsonl(Data):
    path: str = MISSING  # one JSON object a line: a text, or a prompt and its completion
    eval_path: Optional[str] = None  # held-out records; without it records are held out by a hash of their line
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how many of them
    text_field: str = "text"
    prompt_field: str = "prompt"  # conditions the completion; no loss on it
    completion_field: str = "completion"


@dataclass
class Method:
    """What of a model trains. The options of the optimizer that a method suggests count where they are not given."""

    lr: float = option("${model.lr}", low=0)
    weight_decay: float = option(0.1, low=0)


@dataclass
class Full(Method):
    """Train every parameter."""


@dataclass
class Lora(Method):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), by peft."""

    r: int = option(8, low=1)
    alpha: float = option(8.0, low=0)
    dropout: float = option(0.0, low=0, high=1)
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # names of modules, such as [q_proj,v_proj]


@dataclass
class Selective(Method):
    """Train some parameters as they are, and freeze the rest (PERP: Zimmer et al. 2023, arXiv:2312.15230)."""

    name: str = "selective"
    parameters: list[str] = field(default_factory=list)  # patterns found in the names of those that train


class Selector(Enum):
    random = "random"
    magnitude = "magnitude"  # the largest weights
    smallest = "smallest"  # the smallest weights
    low_rank = "low_rank"  # the largest of the weight's best approximation of rank `rank`
    gradient = "gradient"  # the largest gradients of the first global batch
    squared_gradient = "squared_gradient"  # the largest sums of squared gradients over its micro-batches
    delta = "delta"  # what a full phase changed most


class Granularity(Enum):
    element = "element"
    inputs = "inputs"  # whole columns of the weight: input channels, or the inputs that a head has
    outputs = "outputs"  # whole rows


class Allocator(Enum):
    uniform = "uniform"  # the same share of every weight
    whole = "whole"  # the best of all weights together
    rank = "rank"  # of every weight as much as a low-rank pair of rank `budget_rank` holds
    by_module = "by_module"  # `densities` by pattern
    threshold = "threshold"  # all below `threshold`


class Reselection(Enum):
    once = "once"
    renew = "renew"  # select anew; what is dropped keeps what it learned (LIFT)
    regrow = "regrow"  # drop the least changed, which go back, and grow others from nothing (SpIEL)
    narrow = "narrow"  # once, in the middle: go on with those that are still selected (SaRA)
    rewind = "rewind"  # train all first, select what changed most, rewind, and train that (LT-SFT)


class Growth(Enum):
    gradient = "gradient"  # by gradients accumulated over `window` steps on candidates (SpIEL-AG)
    sm3 = "sm3"  # by the product of SM3's row and column accumulators (SpIEL-MA)


@dataclass
class Sparse(Method):
    """Train some entries of the weights of linear layers: a selector, an allocator and a schedule of re-selections."""

    weight_decay: float = option(0.0, low=0)  # of the difference from the base
    name: str = "sparse"
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    selector: Selector = Selector.random
    granularity: Granularity = Granularity.element
    rank: int = option(32, low=1)  # of selector=low_rank
    allocator: Allocator = Allocator.uniform
    density: float = option(0.01, low=0, high=1)  # of allocator=uniform and allocator=whole
    budget_rank: float = option(8, low=0)  # of allocator=rank
    densities: list[str] = field(default_factory=list)  # pattern:density of allocator=by_module; the first counts
    threshold: float = option(2e-3, low=0)  # of allocator=threshold, on the absolute weight
    promote_rank: int = option(
        0, low=0
    )  # a weight with enough hits trains a low-rank pair of this rank instead; 0: none
    promote_alpha: float = option(8.0, low=1)  # enough hits are promote_rank (m + n) / promote_alpha
    schedule: Reselection = Reselection.once
    every: int = option(0, low=0)  # steps between re-selections; of `narrow` and `rewind` the step; 0: half the steps
    growth: Growth = Growth.gradient  # of schedule=regrow
    rate: float = option(0.2, low=0, high=1)  # share of the entries that `regrow` replaces at first; falls to zero
    window: int = option(5, low=1)  # steps that gradients of candidates are accumulated for
    nuclear: float = option(0.0, low=0)  # weight of the nuclear norm of one layer's difference a step (SaRA)
    l1: float = option(0.0, low=0)  # weight of the mean absolute difference from the base (LT-SFT)
    bf16_weights: bool = False  # keep frozen weights in bf16; what trains stays fp32


@dataclass
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    lr: float = option("${method.lr}", low=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = option(1e-8, low=0)
    weight_decay: float = option("${method.weight_decay}", low=0)  # on matrices only, not on norms and biases
    lr_scale: list[str] = field(default_factory=list)  # pattern:factor, of lr for names that match; the first counts
    clip: float = option(1.0, low=0)  # largest norm of the whole gradient; 0: no clipping


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
    flush_rate: float = option(0, low=0)  # bytes a second at most from memory to checkpoint.dir; 0: as fast as it goes
    check_fence: bool = False  # find writes to the state while it is copied, at twice the price of a snapshot


@dataclass
class Checkpoint:
    dir: str = "${run.dir}/checkpoints"
    every: int = option(100, low=0)  # steps; 0: only after the last
    keep: int = option(2, low=1)  # newest generations that stay
    keep_every: int = option(0, low=0)  # and those of every so many steps, for ever; 0: none
    keep_best: int = option(0, low=0)  # and so many of the lowest held-out loss, of those saved where it was evaluated
    memory: Memory = field(default_factory=Memory)


@dataclass
class Elastic:
    """What happens when this run is told that its machines will be taken away."""

    grace_s: float = option(30, low=0)  # from the warning to the end: time to finish a step and to save it
    signal: str = "USR1"  # warns, as SIGTERM always does


class Tracker(Enum):
    wandb = "wandb"
    none = "none"


@dataclass
class Tracking:
    tracker: Tracker = Tracker.wandb
    project: str = "evershard"
    print_every: int = option(20, low=1)  # steps between lines, where the output is not a terminal


@dataclass
class Launch:
    """How `python -m launch` starts the processes; each option is one of its flags too."""

    nproc: int = option(1, low=1)  # processes a machine


@dataclass
class LocalLaunch(Launch):
    """Processes on this machine, by torchrun."""


@dataclass
class TorchrunLaunch(Launch):
    """One torchrun a machine: the same command is started on each of them."""

    nodes: str = "1"  # machines, or MIN:MAX of them: after one is lost the run goes on with those that are left
    endpoint: str = ""  # HOST:PORT of the machine where they meet; needed for more than one
    job: str = "${run.name}"  # machines meet under this name
    restarts: int = option(3, low=0)  # times that processes are started again after a failure, where nodes may be lost
    log_dir: str = "${run.dir}/logs"  # what every process prints, beside the terminal


@dataclass
class DeepspeedLaunch(Launch):
    """The `deepspeed` launcher."""

    hostfile: str = ""  # its list of machines and slots; empty: nproc processes here
    port: int = option(29500, low=0, high=65535)  # where they meet


@dataclass
class AccelerateLaunch(Launch):
    """`accelerate launch`."""

    config_file: str = ""  # its configuration; empty: nproc processes here
    port: int = option(0, low=0, high=65535)  # where they meet; 0: any


@dataclass
class SlurmLaunch(Launch):
    """A job of SLURM, which goes on after preemptions, time limits and lost machines."""

    nodes: str = "1"  # machines, or MIN-MAX of them
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""  # such as 8:00:00; the job is requeued when it is over
    gpus: int = option(0, low=0)  # a machine (--gres=gpu:N)
    cpus: int = option(0, low=0)  # a machine (--cpus-per-task); 0: SLURM's default
    mem: str = ""  # a machine, such as 200G
    exclude: str = ""  # machines that are not wanted
    dependency: str = ""  # such as afterok:1234
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, such as --constraint=a100
    srun: list[str] = field(default_factory=list)  # and of srun, such as --container-image=IMAGE
    setup: list[str] = field(default_factory=list)  # lines of the script before anything runs, such as module load cuda
    health: str = ""  # a command that a healthy machine ends with status 0, beside the checks of our own
    warn_s: int = option(120, low=10)  # from the warning before the time limit to the end
    max_requeues: int = option(3, low=0)  # in a row without a new committed step, before the job gives up
    parallel_points: int = option(0, low=0)  # of a sweep, jobs that run at a time; 0: all


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


# Choices of a group whose options differ: each has a YAML of the same name in conf/, which brings in its schema.
CHOICES: dict[str, dict[str, type]] = {
    "model": {"tiny_llama": TinyLlama, "hf": HuggingFace},
    "data": {"stdlib": Stdlib, "text": Text, "jsonl": Jsonl},
    "launch": {
        "local": LocalLaunch,
        "torchrun": TorchrunLaunch,
        "deepspeed": DeepspeedLaunch,
        "accelerate": AccelerateLaunch,
        "slurm": SlurmLaunch,
    },
    "method": {"full": Full, "lora": Lora, "selective": Selective, "sparse": Sparse},
}


def register() -> None:
    """Make the schemas known to Hydra, so that unknown keys and wrong types are refused when it composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, choices in CHOICES.items():
        for name, schema in choices.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def from_hydra(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses, checked. `Refused` names the override to type."""
    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "an option"
        raise Refused(f"{key} has no value and no default. Add {key}=... to the command.") from None
    assert isinstance(config, Config)
    # `+key=value` adds to a Hydra configuration even where the schema knows no such key, and `~key` takes away.
    given, known = set(flatten(OmegaConf.to_container(composed))), option_keys(config)
    if unknown := sorted(given - known):
        raise Refused(unknown_key(unknown[0]))
    if removed := sorted(known - given):
        raise Refused(f"{removed[0]} was removed from the configuration. Leave out the override that starts with ~.")
    check(config)
    return config


def option_keys(config: Config) -> set[str]:
    """The dotted names of all options under the choices that were made."""
    return set(flatten({key: value for key, value in as_json(config).items() if key != "choices"}))


def unknown_key(key: str) -> str:
    """Why an option is refused, and what may have been meant."""
    group, _, name = key.partition(".")
    owners = [
        f"{group}={c}" for c, schema in CHOICES.get(group, {}).items() if name in {f.name for f in fields(schema)}
    ]
    if owners:
        return f"{key} is an option of {' and '.join(owners)} only. Choose {' or '.join(owners)}, or leave it out."
    known = set().union(*(option_keys(config) for config in _one_of_each_choice()))
    close = get_close_matches(key, sorted(known), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`python -m trainer --cfg job` prints every option."
    return f"There is no option {key}. {hint}"


def _one_of_each_choice() -> list[Config]:
    default = Config(model=TinyLlama(), data=Stdlib(), method=Full(), launch=LocalLaunch())
    return [replace(default, **{group: schema()}) for group, choices in CHOICES.items() for schema in choices.values()]


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train": {"steps": 3}}` as `{"train.steps": 3}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def check(config: Config) -> None:
    """The bounds of every number, and the rules across fields. Sizes of the world are checked in plan.py."""
    _check_bounds(config, "")
    if not config.run.name.strip() or not config.run.dir.strip():
        raise Refused("run.name and run.dir must not be empty. Type run.name=NAME.")
    known = option_keys(config) | set(CHOICES)
    for key in config.resume_allow:
        if not any(k == key or k.startswith(f"{key}.") for k in known):
            raise Refused(f"resume_allow names {key}. {unknown_key(key)}")
    betas, model = config.optimizer.betas, config.model
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise Refused(f"optimizer.betas={betas} must be two numbers in [0, 1), such as optimizer.betas=[0.9,0.95].")
    rates_by_pattern(config.optimizer.lr_scale)
    try:
        warnings_of(config.elastic.signal)
    except ValueError:
        raise Refused(
            f"elastic.signal={config.elastic.signal} is no signal that can warn. Type USR1 or USR2."
        ) from None
    if isinstance(model, TinyLlama):
        _check_heads(model)
    _check_fp16(config)
    parallel = config.parallel
    for name in ("zero_stage", "offload", "deepspeed"):
        if (value := getattr(parallel, name)) and not parallel.uses_deepspeed:
            raise Refused(
                f"parallel.{name}={value} is an option of DeepSpeed only. Type parallel=zero1, parallel=zero2 "
                f"or parallel=zero3 with it, or leave it out."
            )


def _check_fp16(config: Config) -> None:
    """A gradient that overflowed would decide for good what trains, and a loss scale would shrink penalties."""
    method = config.method
    if config.precision.compute is not Compute.fp16 or not isinstance(method, Sparse):
        return
    early = method.selector in (Selector.gradient, Selector.squared_gradient)
    grows = method.schedule is Reselection.regrow and method.growth is Growth.gradient
    if early or grows or method.l1 or method.nuclear:
        raise Refused(
            f"method={method.name} looks at gradients or adds a penalty to them, which precision=fp16 scales. Type "
            "precision=bf16."
        )


def _check_bounds(options: Any, prefix: str) -> None:
    for f in fields(options):
        value, key = getattr(options, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            _check_bounds(value, f"{key}.")
        elif "low" in f.metadata and not (f.metadata["low"] <= value <= f.metadata["high"] and isfinite(value)):
            low, high = f.metadata["low"], f.metadata["high"]
            wanted = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
            wanted = wanted if isfinite(value) else f"a finite number, {wanted}"
            raise Refused(f"{key}={value} must be {wanted}. Type {key}={low} or more.")


def rates_by_pattern(lr_scale: list[str]) -> dict[str, float]:
    """What optimizer.lr_scale says, in its order. `Refused` for what is no pattern:factor."""
    found = {}
    for given in lr_scale:
        pattern, _, factor = given.rpartition(":")
        try:
            re.compile(pattern)
            found[pattern] = float(factor)
            flaw = "" if pattern and isfinite(found[pattern]) and found[pattern] >= 0 else "it has no factor from 0 on"
        except (re.error, ValueError) as error:
            flaw = str(error)
        if flaw:
            raise Refused(
                f"optimizer.lr_scale={given} is no pattern:factor ({flaw}). Type one such as "
                "'optimizer.lr_scale=[\"lm_head:0.1\"]'."
            )
    return found


def _check_heads(model: TinyLlama) -> None:
    if model.hidden_size % (2 * model.num_heads):
        fitting = 2 * model.num_heads * max(1, model.hidden_size // (2 * model.num_heads))
        raise Refused(
            f"model.hidden_size={model.hidden_size} does not split into model.num_heads={model.num_heads} heads of an "
            f"even size. Type model.hidden_size={fitting}."
        )
    if model.num_heads % model.num_kv_heads:
        raise Refused(
            f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}. "
            f"Type model.num_kv_heads={model.num_heads} or another divisor."
        )


def as_json(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, enumerations by name."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, Enum):
            return value.name
        return list(value) if isinstance(value, list | tuple) else value

    return {**plain(config), "choices": {group: choice_of(config, group) for group in CHOICES}}


def from_json(saved: dict[str, Any]) -> Config:
    """What `as_json` gave, as a checkpoint holds it; options that a later release added have their defaults."""
    first = {group: next(iter(known)) for group, known in CHOICES.items()}  # of groups that a later release added
    choices = {group: CHOICES[group][name]() for group, name in {**first, **saved["choices"]}.items()}
    plain = {key: value for key, value in saved.items() if key != "choices"}
    merged = OmegaConf.merge(OmegaConf.structured(Config(**choices)), plain)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


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
