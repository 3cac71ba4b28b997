"""Training in this process as it is placed, and the layouts that every engine is tried under.

`start(overrides)` is the model, its training and its feed in one; `training_here` and `feed_for` are its parts, for a
configuration, model or dataset of one's own. `train_and_save` and `resume` take one layout's state into another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from checkpointing import Piece, describe, load, parameter_names, save
from checkpointing.diff import compare
from checkpointing.generations import newest
from checkpointing.layouts.zero import describe_zero
from checkpointing.reader import GenerationReader
from checkpointing.stores import open_storage
from trainer.compose import compose
from trainer.data.dataset import Windows
from trainer.data.feed import Feed
from trainer.loop import optimize
from trainer.methods import build, method_of
from trainer.methods.externals import externals_of, with_external
from trainer.methods.sparse.layer import sparse_layers
from trainer.options.config import Config
from trainer.parallel.deepspeed_engine import DeepSpeedEngine
from trainer.parallel.world import World
from trainer.plan import resolve_topology
from trainer.training import Training, make_training

CPU = torch.device("cpu")
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "single": (1, []),
    "ddp": (2, ["parallel=ddp"]),
    "fsdp": (2, ["parallel=fsdp"]),
    "fsdp on 3": (3, ["parallel=fsdp"]),
    "hsdp 2x2": (4, ["parallel.dp_replicate=2", "parallel.dp_shard=2"]),
    "tp": (2, ["parallel=tp"]),
    "tp on 3": (3, ["parallel=tp"]),
    "fsdp x tp": (4, ["parallel=tp", "parallel.dp_shard=2"]),
    "ddp x tp": (4, ["parallel=tp", "parallel.dp_replicate=2"]),
    "pp": (2, ["parallel=pp"]),
    "pp on 3, gpipe": (3, ["parallel=pp", "parallel.pp_schedule=gpipe"]),
    "pp x ddp": (4, ["parallel=pp", "parallel.dp_replicate=2"]),
    "pp x fsdp": (4, ["parallel=pp", "parallel.dp_shard=2"]),
    "pp x tp": (4, ["parallel=pp", "parallel.tp=2"]),
    "pp, interleaved": (2, ["parallel=pp", "parallel.pp_schedule=interleaved"]),
    "accelerate": (2, ["parallel=accelerate"]),
    "zero 0": (2, ["parallel.engine=deepspeed"]),
    "zero 1": (2, ["parallel=zero1"]),
    "zero 2": (2, ["parallel=zero2"]),
    "zero 3": (2, ["parallel=zero3"]),
    "zero 3 on 3": (3, ["parallel=zero3"]),
    "zero 3, offload": (2, ["parallel=zero3", "parallel.offload=true"]),
}
# Sizes that no number of ranks here divides, but for the layers that two stages a process need.
MODEL = [
    "model.hidden_size=24",
    "model.intermediate_size=53",
    "model.num_layers=5",
    "model.num_heads=6",
    "model.num_kv_heads=3",
    "model.vocab_size=257",
]
TRAINING = [
    "train.seq_len=12",
    "train.global_batch=10",
    "train.micro_batch=2",
    "schedule=constant",
    "schedule.warmup_steps=0",
]
STEPS = 6
BARS = {"fp32": 1e-5, "bf16": 1e-2}
# The learning rate, and how many of the 257 tokens the data has: in bf16 a run must get so far in six steps that what
# Adam's moments do for it stands out from the rounding.
LEARNING = {"fp32": (1e-3, 257), "bf16": (1e-2, 8)}


@dataclass(frozen=True)
class Started:
    """Training in this process's world, and its data."""

    config: Config
    training: Training
    feed: Feed

    def train(self, first: int, last: int) -> list[float]:
        """The losses of steps first to last."""
        lr, _ = LEARNING[self.config.precision.compute.name]
        return [optimize(self.training, self.feed.step(step), lr, step)[0] for step in range(first, last + 1)]

    def logits(self) -> torch.Tensor:
        return self.training.next_logits(torch.arange(24).reshape(2, 12) * 7 % 257).float().cpu()


def place() -> World:
    """This process among the others of its group, all on this machine."""
    if not dist.is_initialized():
        return World()
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size)


def training_here(
    config: Config, model: nn.Module | None = None, *, device: torch.device = CPU, sizes: dict[str, int] | None = None
) -> Training:
    """The training that a configuration asks for, in this process's group, of its own model or the given one."""
    world = place()
    made = build(config, sizes=sizes) if model is None else model
    return make_training(config, made, resolve_topology(config.parallel, world.size), world, device, sizes)


def feed_for(training: Training, config: Config, dataset: Any, seed: int = 1) -> Feed:
    """This rank's share of every batch."""
    return Feed(
        dataset,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=seed,
        pad=0,
        num_ranks=training.data_size,
        rank=training.data_rank,
    )


def windows(length: int, num_tokens: int = 256, count: int = 3000) -> Windows:
    """Random tokens, the same in every process: samples of `length`."""
    kind = np.uint8 if num_tokens <= 256 else np.uint16
    return Windows(np.random.default_rng(0).integers(0, num_tokens, count).astype(kind), length)


def start(overrides: list[str], full: Path | str | None = None, seed: int = 0) -> Started:
    """With a model of random weights, or of those in the checkpoints of a directory."""
    sizes = () if "model=hf" in overrides else MODEL
    config = compose([*sizes, *TRAINING, *overrides, f"train.seed={seed}"])
    model = build(config)
    if full is not None:
        method = method_of(config)
        frozen = externals_of(model, method, 0, 1) if method.freezes else []
        load(full, with_external(describe(model), frozen), only=["model/"])
    training = training_here(config, model)
    _, num_tokens = LEARNING[config.precision.compute.name]
    return Started(config, training, feed_for(training, config, windows(12, num_tokens)))


def train_and_save(overrides: list[str], directory: Path | str) -> dict[str, Any]:
    """Six steps under a layout, saved. The losses, and how many tensors differ from what the engine's API gathers."""
    started = start(overrides)
    losses = started.train(1, STEPS)
    save(directory, STEPS, started.training.pieces())
    gathered = gather(started.training.engine)
    return {"losses": losses, "gathered": len(gathered), "wrong": differing(gathered, directory)}


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """Full parameters and moments by the engine's own API; none where it has none."""
    named: dict[str, Any] = dict(parameter_names(engine._bare))
    if isinstance(getattr(engine, "_engine", None), nn.Module):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        inner = engine._engine
        if inner.zero_optimization_stage() == 0:  # nothing is taken apart
            whole = {f"model/{name}": parameter for name, parameter in named.items()}
            keys = moments_of(inner.optimizer)
            moments = {(n, key): inner.optimizer.state[p][key] for n, p in named.items() for key in keys}
        else:
            if inner.zero_optimization_stage() < 3:  # its links leave out the second param group until made anew
                inner.optimizer._hp_optimizer_states_linked = False
                inner.optimizer._lazy_init_hp_params_optimizer_state()
            whole = {f"model/{name}": safe_get_full_fp32_param(parameter) for name, parameter in named.items()}
            keys = moments_of(inner.optimizer.optimizer)
            moments = {(n, key): safe_get_full_optimizer_state(p, key) for n, p in named.items() for key in keys}
    elif engine._cuts.held or engine._pipeline is not None:  # what torch gathers is then a part only
        return {}
    else:
        sharded = {name: p for name, p in named.items() if isinstance(p, DTensor)}
        state = engine._optimizer.state
        whole = {f"model/{name}": parameter.full_tensor() for name, parameter in sharded.items()}
        keys = moments_of(engine._optimizer)
        moments = {(n, key): state[p][key].full_tensor() for n, p in sharded.items() for key in keys}
    found = {**whole, **{f"optim/{name}/{key}": moment for (name, key), moment in moments.items()}}
    return {name: tensor.detach() for name, tensor in found.items()}


def moments_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """What an optimizer keeps in the form of a parameter."""
    state: dict[str, Any] = next(iter(optimizer.state.values()), {})
    return [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()]


def differing(gathered: dict[str, torch.Tensor], directory: Path | str) -> list[str]:
    """Names whose stored content is not bit for bit what was gathered."""
    targets = {name: torch.full_like(tensor, torch.nan) for name, tensor in gathered.items()}
    if targets:
        pieces = [Piece(name, t, (0,) * t.dim(), tuple(t.shape)) for name, t in targets.items()]
        load(directory, pieces, only=["model/", "optim/"])
    return [name for name, tensor in gathered.items() if not torch.equal(tensor, targets[name])]


def resume(overrides: list[str], source: Path | str, again: Path | str, *, control: bool) -> dict[str, Any]:
    """Load under a layout, save at once, compare the first forward, and train on; the losses, and the control's."""
    started = start(overrides, seed=1)
    load(source, started.training.pieces())
    started.training.publish()
    save(again, STEPS, started.training.pieces())
    same = torch.equal(started.logits(), start(overrides, full=source, seed=1).logits())
    found = {"same_forward": same, "losses": started.train(STEPS + 1, 2 * STEPS)}
    if control:
        load(source, started.training.pieces())
        with torch.no_grad():
            for piece in started.training.pieces():
                if isinstance(piece, Piece) and piece.name.endswith(("/exp_avg", "/exp_avg_sq")):
                    piece.tensor.zero_()
        started.training.publish()
        found["control"] = started.train(STEPS + 1, 2 * STEPS)
    return found


def contents_differ(one: Path | str, other: Path | str) -> list[str]:
    """Names of tensors that are not bit-equal in the newest generations of two directories."""
    readers = []
    for directory in (one, other):
        storage = open_storage(directory)
        generation = newest(storage)
        assert generation is not None and generation.manifest is not None
        readers.append(GenerationReader(storage, generation.manifest))
    return [found.name for found in compare(*readers) if found.state != "equal"]


def furthest(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def held_by(training: Training) -> list[torch.Tensor]:
    """What training keeps between steps."""
    inner: Any = training.engine
    held = [piece.tensor for piece in training.pieces() if isinstance(piece, Piece)]
    for layer in sparse_layers(inner._bare).values():
        if (support := layer._support) is not None:
            held += [support.rows, support.columns]
            if support.pattern is not None:
                held += [support.pattern.crow_indices(), support.pattern.col_indices(), support.pattern.values()]
    if (trained := getattr(training.method, "_trained", None)) is not None:
        parts = [part for place in trained._places.values() for part in place.parts]
        held += [t for part in parts for t in (*part.index, *part.chosen) if isinstance(t, torch.Tensor)]
        held += [t for state in trained.states.values() for one in vars(state).values() for t in vars(one).values()]
    if isinstance(inner, DeepSpeedEngine):
        return held_by_deepspeed(inner._engine) + (held if trained is not None else [])
    # Frozen ones are in no checkpoint.
    return held + [local_of(tensor) for tensor in (*inner._bare.parameters(), *inner._bare.buffers())]


def held_by_deepspeed(engine: Any) -> list[torch.Tensor]:
    """Parameters, their masters and moments."""
    parameters = [getattr(parameter, "ds_tensor", parameter).detach() for parameter in engine.module.parameters()]
    return [*parameters, *(piece.tensor for piece in describe_zero(engine))]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
