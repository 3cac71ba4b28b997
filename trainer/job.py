"""A run as one process knows it before the processes join: data, shapes, layout, and the plan that is printed.

Whatever one process can refuse by itself is refused here, or in `trainer.resume.decide`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from checkpointing.printing import shown
from trainer.data.dataset import Dataset
from trainer.data.order import steps_of
from trainer.data.sources import Corpus, load_corpus, load_sets
from trainer.data.tokenizer import Tokenizer
from trainer.errors import Refused
from trainer.footprint import footprint, plan_memory
from trainer.methods import build, build_largest
from trainer.models import check_packing, load_tokenizer
from trainer.optimizers import optimizer_of, suits
from trainer.optimizers.groups import lr_scales
from trainer.options.config import Config
from trainer.out_of_memory import remedies
from trainer.parallel.auto import Cluster, choose, memory_of
from trainer.parallel.axes import is_possible, refuse_layout
from trainer.parallel.compiling import check_compiling
from trainer.parallel.engine import find_topology
from trainer.parallel.world import World
from trainer.plan import MemoryPlan, Topology, describe_run, plan_batch
from trainer.schedule import never_reached
from trainer.track.tracker import where_figures_go

Lines = list[tuple[str, str]]  # (label, text)


@dataclass(frozen=True)
class Job:
    """A run as one process knows it before the processes join."""

    config: Config
    world: World
    device: torch.device
    topology: Topology
    tokenizer: Tokenizer
    corpus: Corpus
    sets: dict[str, Dataset]  # that are evaluated apart
    shapes: nn.Module  # the model with its method, on the device meta
    before_step: Callable[[int], None] | None = None  # for whoever watches the steps, see `trainer.loop.train`


def read(config: Config, world: World, device: torch.device) -> tuple[Job, Lines]:
    """Read the data, choose the layout, and work out the plan."""
    if not config.parallel.auto:
        find_topology(config, world, device)  # refused before anything is read
    check_compiling(config, device)
    config, tokenizer, corpus, sets = read_data(config)
    model = build(config, "meta")
    check_vocabulary([corpus.train, corpus.held_out, *sets.values()], model, tokenizer.eos)
    if config.data.pack:
        check_packing(model)
    lr_scales(model, config.optimizer)
    config, topology, memory, why = lay_out(config, model, world, device)
    job = Job(config, world, device, topology, tokenizer, corpus, sets, model)
    return job, plan_of(job, memory, why)


def read_data(config: Config) -> tuple[Config, Tokenizer, Corpus, dict[str, Dataset]]:
    """Read the tokenizer, the corpus and the sets that are evaluated apart; `train.epochs` becomes steps."""
    tokenizer = load_tokenizer(config.model)
    corpus = load_corpus(config.data, tokenizer, config.train.seq_len)
    sets = load_sets(config.eval.sets, config.data, tokenizer, config.train.seq_len)
    if config.train.epochs is not None:
        size, ratio = len(corpus.train), config.data.ratio
        steps = steps_of(config.train.epochs, dataset_size=size, global_batch=config.train.global_batch, ratio=ratio)
        config = replace(config, train=replace(config.train, steps=steps))
    return config, tokenizer, corpus, sets


def lay_out(
    config: Config, model: nn.Module, world: World, device: torch.device
) -> tuple[Config, Topology, MemoryPlan, list[str]]:
    """Find the degrees, and the memory that they take; with parallel=auto choose them, and say why.

    `model` has shapes only. `Refused` where it cannot be taken apart so.
    """
    sizes, why = footprint(config, build_largest(config)), list[str]()
    optimizer = optimizer_of(config)
    if config.parallel.auto:
        cluster = Cluster(world.size, world.local_size, memory_of(device, world.local_size))
        config, why = choose(
            config,
            sizes,
            cluster,
            lambda topology: is_possible(model, topology, config),
            lambda topology: suits(optimizer, model, topology),
        )
    topology = find_topology(config, world, device)
    batch = plan_batch(config, topology.data_size)
    refuse_layout(model, topology, config)
    optimizer.refuse(model, topology)
    return config, topology, plan_memory(config, sizes, topology, batch.rounds), why


def plan_of(job: Job, memory: MemoryPlan, why: Sequence[str]) -> Lines:
    """The lines of the plan; `why` are those on the layout that was chosen."""
    config, corpus, sets = job.config, job.corpus, job.sets
    batch = plan_batch(config, job.topology.data_size)
    epoch = len(corpus.train) * config.data.ratio / config.train.global_batch
    held_out = f"{len(corpus.held_out):,} held out"
    optimizer = optimizer_of(config).about(job.shapes)
    plan = describe_run(config, job.shapes, job.topology, batch, memory, job.device.type, optimizer)
    plan.insert(1, ("data", f"{corpus.name}: {len(corpus.train):,} samples ({epoch:,.1f} steps an epoch), {held_out}"))
    plan += [("data", note) for note in corpus.notes]
    plan += [("data", f"eval_loss/{name} on {len(dataset):,} samples") for name, dataset in sets.items()]
    plan += [("layout", line) for line in why]
    if where := where_figures_go(config):
        plan.append(("tracking", where))
    if said := never_reached(config.train.steps, config.optimizer.lr, config.schedule):
        plan.append(("schedule", said))
    if memory.total > (room := memory_of(job.device, job.world.local_size)):
        plan.append(
            (
                "memory",
                f"a process has {room / 1e9:.1f} GB here, which is less than it is expected to need. What takes less: "
                + "; ".join(remedies(config)),
            )
        )
    return plan


def say_plan(config: Config, lines: Lines) -> None:
    print(f"{config.run.name} in {config.run.dir}")
    print("\n".join(f"  {label:10} {shown(text)}" for label, text in lines), flush=True)


def check_vocabulary(datasets: Sequence[Dataset], model: nn.Module, pad: int) -> None:
    """`Refused` where the model has no row for a token of the data, or for the one that fills rows up."""
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # every transformers model has it
    if (largest := max(dataset.largest_token for dataset in datasets)) >= size:
        raise Refused(
            f"The data holds token {largest}, and the model knows {size} tokens. Give the model its own tokenizer."
        )
    if pad >= size:
        raise Refused(
            f"The token that ends and fills up is number {pad}, and the model knows {size} tokens. Name one that it "
            "knows as eos_token in its tokenizer_config.json, or give the model more rows (resize_token_embeddings)."
        )
