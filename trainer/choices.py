"""Options of the groups where one of several is chosen: `model=hf`, `method=lora`. Fields, defaults, bounds, help.

The other groups are in config.py, and the checks across fields in check.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Optional

from omegaconf import MISSING

# OmegaConf reads these annotations at run time and knows Optional[int], not int | None.


def option(default: Any, low: float, high: float = float("inf")) -> Any:
    """A number with its default and its bounds, both included."""
    return field(default=default, metadata={"low": low, "high": high})


class Attention(Enum):
    """By transformers' names."""

    auto = "auto"  # what transformers takes for a model: torch's scaled_dot_product_attention in nearly all
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"  # needs the package flash-attn and a GPU
    flex_attention = "flex_attention"  # trains on a GPU only
    eager = "eager"


@dataclass
class Model:
    attention: Attention = Attention.auto  # which kernel computes it; the same result but for rounding
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


class Order(Enum):
    shuffled = "shuffled"  # every epoch in an order of its own
    rs2 = "rs2"  # short epochs, each the next part of one order, until all was seen (RS2)


@dataclass
class Data:
    order: Order = Order.shuffled
    ratio: float = option(1.0, low=1e-9, high=1)  # of the data, that an epoch of order=rs2 has
    log_ids: bool = False  # write the ids of the samples that each step consumed into metrics.jsonl
    pack: bool = False  # several samples in one row of train.seq_len, none of which sees another


@dataclass
class RecordData(Data):
    """Of records, which can be tokenized once and kept."""

    cache: Optional[str] = None  # a directory for tokenized records, which are mapped from there; null: in memory
    workers: int = option(0, low=0)  # processes that tokenize into it; 0: one for each core


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
class Jsonl(RecordData):
    path: str = MISSING  # one JSON object a line: a text, or a prompt and its completion
    eval_path: Optional[str] = None  # held-out records; without it records are held out by a hash of their line
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how many of them
    text_field: str = "text"
    prompt_field: str = "prompt"  # conditions the completion; no loss on it
    completion_field: str = "completion"


@dataclass
class Chat(RecordData):
    """Conversations, through the model's chat template; what the assistant says is learned."""

    path: str = MISSING  # one JSON object a line: messages, conversations, or instruction, input and output
    eval_path: Optional[str] = None  # held-out conversations; without it they are held out by a hash of their line
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how many of them
    template: str = ""  # a file with a Jinja template, or chatml; empty: the tokenizer's own


@dataclass
class Hub(RecordData):
    """A dataset of the Hugging Face hub, or a directory of its library: texts, pairs or conversations."""

    path: str = MISSING  # a hub id or a directory
    name: Optional[str] = None  # of a dataset that has several
    revision: Optional[str] = None  # a branch, tag or commit
    split: str = "train"
    eval_split: Optional[str] = None  # held-out rows; without it they are held out by a hash of the row
    eval_fraction: float = option(0.02, low=0, high=0.9)  # how many of them
    template: str = ""  # as of data=chat
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"


@dataclass
class Mix(RecordData):
    """Several sources at once, each with its share of the samples."""

    sources: list[str] = field(default_factory=list)  # KIND:PATH@SHARE, such as chat:talk.jsonl@2; shares add up to all
    eval_fraction: float = option(0.02, low=0, high=0.9)  # of each
    template: str = ""  # as of data=chat


@dataclass
class Method:
    """What of a model trains. The options of the optimizer that a method suggests count where they are not given."""

    made_by: ClassVar[str] = "trainer.methods.method:Method"  # MODULE:CLASS of the method itself

    lr: float = option("${model.lr}", low=0)
    weight_decay: float = option(0.1, low=0)


@dataclass
class Full(Method):
    """Train every parameter."""


@dataclass
class Lora(Method):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), by peft."""

    made_by: ClassVar[str] = "trainer.methods.lora:LoraMethod"

    r: int = option(8, low=1)
    alpha: float = option(8.0, low=0)
    dropout: float = option(0.0, low=0, high=1)
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"]
    )  # names of modules, such as [q_proj,v_proj]


@dataclass
class Selective(Method):
    """Train some parameters as they are, and freeze the rest (PERP: Zimmer et al. 2023, arXiv:2312.15230)."""

    made_by: ClassVar[str] = "trainer.methods.selective:SelectiveMethod"

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

    made_by: ClassVar[str] = "trainer.methods.sparse.method:SparseMethod"

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
    port: int = option(0, low=0, high=65535)  # where they meet; 0: any on this machine, 29500 with a hostfile


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


# Options whose values may be secret, such as `export HF_TOKEN=...`: they go into no record of a run, wherever it lies.
SECRET = ("launch.setup",)


def is_secret(override: str) -> bool:
    """Whether an override sets an option whose value may be secret."""
    return override.lstrip("+~").partition("=")[0] in SECRET


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
}
