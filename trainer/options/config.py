"""A whole configuration: all groups together, and which choices some of them have."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass

from trainer.errors import Refused
from trainer.options.checkpoint import Checkpoint
from trainer.options.data import Chat, Data, Hub, Jsonl, Mix, Stdlib, Text
from trainer.options.elastic import Elastic
from trainer.options.evaluation import Eval
from trainer.options.field import free, is_bound_field, is_free_field
from trainer.options.launch import AccelerateLaunch, DeepspeedLaunch, Launch, LocalLaunch, SlurmLaunch, TorchrunLaunch
from trainer.options.method import Full, Lora, MethodOptions, Selective, Sparse
from trainer.options.model import HuggingFace, Model, TinyLlama
from trainer.options.optimizer import Optimizer
from trainer.options.parallel import Parallel
from trainer.options.precision import Precision
from trainer.options.run import Run
from trainer.options.schedule import Schedule
from trainer.options.tracking import Tracking
from trainer.options.train import Train


@dataclass
class Config:
    run: Run = free(Run)
    train: Train = field(default_factory=Train)
    eval: Eval = free(Eval)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    method: MethodOptions = field(default_factory=MethodOptions)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    parallel: Parallel = free(Parallel)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = free(Checkpoint)
    elastic: Elastic = free(Elastic)
    tracking: Tracking = free(Tracking)
    launch: Launch = free(Launch)
    resume: str = free("auto")  # auto: go on with what run.dir holds, if anything; none: start over; or a path
    resume_allow: list[str] = free(list)  # keys that may differ although they alter the result
    dry_run: bool = free(False)  # print the plan and stop


# Choices of a group whose options differ: each has a YAML of the same name in conf/, which brings in its schema.
CHOICES: dict[str, dict[str, type]] = {
    "model": {"tiny_llama": TinyLlama, "hf": HuggingFace},
    "data": {"stdlib": Stdlib, "text": Text, "jsonl": Jsonl, "chat": Chat, "hf": Hub, "mix": Mix},
    "launch": {
        "local": LocalLaunch,
        "torchrun": TorchrunLaunch,
        "deepspeed": DeepspeedLaunch,
        "accelerate": AccelerateLaunch,
        "slurm": SlurmLaunch,
    },
    "method": {"full": Full, "lora": Lora, "selective": Selective, "sparse": Sparse},
    "optimizer": {"adamw": Optimizer},
}


def choice_of(config: Config, group: str) -> str:
    """Which choice of a group was composed, such as `lora` for method."""
    chosen = type(getattr(config, group))
    if (name := next((name for name, schema in CHOICES[group].items() if schema is chosen), None)) is None:
        needed = f"- /schema/{group}@_here_: NAME"
        raise Refused(f"The options of {group} are those of no choice. Its YAML needs `{needed}` in its defaults.")
    return name


def method_name(config: Config) -> str:
    """The published method that was composed, where several have the same options; else the choice."""
    return str(getattr(config.method, "name", choice_of(config, "method")))


def is_free(config: Config, key: str) -> bool:
    """Whether a run may go on with another value of an option, or another choice of a group: the result is the same."""
    group, _, name = key.partition(".")
    owner = getattr(config, group, None)
    if is_free_field(Config, group):
        return not (is_dataclass(owner) and is_bound_field(type(owner), name))
    return is_dataclass(owner) and is_free_field(type(owner), name)
