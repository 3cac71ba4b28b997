"""Every layout into every other: trained and saved under one, resumed under another, and nothing is different.

    python -m benchmarks.matrix [--json] [--layouts NAME ...] [--precision fp32 bf16]

Each layout trains a small Llama for six steps and saves. Under every layout each of these is then loaded and
  - saved again at once: the contents are bit-equal;
  - called: the logits are bit-equal to those of a fresh engine built from the same full tensors;
  - trained on: the next six losses are those of a run in one process that was never interrupted, within 1e-5 in fp32
    and 1e-2 in bf16. A control without Adam's moments misses that bar tenfold.
What was saved is also compared with what the engine's own API gathers, where it has one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from benchmarks.report import Row, absolute, finish, free_port, leave
from checkpointing import Piece, describe, load, parameter_names, save
from checkpointing.diff import compare
from checkpointing.generations import newest
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage
from trainer.choices import Lora, Selective
from trainer.compose import compose
from trainer.config import Config
from trainer.data.dataset import Windows
from trainer.data.feed import Feed
from trainer.loop import optimize
from trainer.methods import build
from trainer.methods.externals import frozen_of, with_external
from trainer.parallel.engine import TrainingEngine, make_engine
from trainer.parallel.world import World
from trainer.plan import resolve_topology

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
MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS = 6
BARS = {"fp32": 1e-5, "bf16": 1e-2}
# The learning rate, and how many of the 257 tokens the data has: in bf16 a run must get so far in six steps that what
# Adam's moments do for it stands out from the rounding.
LEARNING = {"fp32": (1e-3, 257), "bf16": (1e-2, 8)}


@dataclass(frozen=True)
class Started:
    """An engine in this process's world, and what it trains on."""

    config: Config
    engine: TrainingEngine
    feed: Feed

    def train(self, first: int, last: int) -> list[float]:
        """The losses of steps first to last."""
        lr, _ = LEARNING[self.config.precision.compute.name]
        return [optimize(self.engine, self.feed.step(step), lr, step)[0] for step in range(first, last + 1)]

    def logits(self) -> torch.Tensor:
        return self.engine.next_logits(torch.arange(24).reshape(2, 12) * 7 % 257).float().cpu()


def start(overrides: list[str], full: Path | None = None, seed: int = 0) -> Started:
    """With a model of random weights, or of those in the checkpoints of a directory."""
    sizes = () if "model=hf" in overrides else MODEL
    config = compose([*sizes, *TRAINING, *overrides, f"train.seed={seed}"])
    world = World(dist.get_rank(), dist.get_world_size(), 0, 1) if dist.is_initialized() else World()
    model = build(config)
    if full is not None:
        frozen = frozen_of(model, config, 0, 1) if isinstance(config.method, Lora | Selective) else []
        load(full, with_external(describe(model), frozen), only=["model/"])
    topology = resolve_topology(config.parallel, world.size)
    engine = make_engine(config, model, topology, world, torch.device("cpu"))
    _, num_tokens = LEARNING[config.precision.compute.name]
    windows = Windows(np.random.default_rng(0).integers(0, num_tokens, 3000).astype(np.uint16), 12)
    feed = Feed(
        windows,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=1,
        pad=0,
        num_ranks=engine.data_size,
        rank=engine.data_rank,
    )
    return Started(config, engine, feed)


def train_and_save(overrides: list[str], directory: Path) -> dict[str, Any]:
    """Six steps under a layout, saved. The losses, and how many tensors differ from what the engine's API gathers."""
    started = start(overrides)
    losses = started.train(1, STEPS)
    save(directory, STEPS, started.engine.pieces())
    gathered = gather(started.engine)
    return {"losses": losses, "gathered": len(gathered), "wrong": differing(gathered, directory)}


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """Full parameters and moments by the engine's own API; none where it has none."""
    named: dict[str, Any] = dict(parameter_names(engine._bare))
    if isinstance(getattr(engine, "_engine", None), nn.Module):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        inner = engine._engine
        if inner.zero_optimization_stage() == 0:  # nothing is taken apart
            whole = {f"model/{name}": parameter for name, parameter in named.items()}
            moments = {(n, key): inner.optimizer.state[p][key] for n, p in named.items() for key in MOMENTS}
        else:
            if inner.zero_optimization_stage() < 3:  # its links leave out the second param group until made anew
                inner.optimizer._hp_optimizer_states_linked = False
                inner.optimizer._lazy_init_hp_params_optimizer_state()
            whole = {f"model/{name}": safe_get_full_fp32_param(parameter) for name, parameter in named.items()}
            moments = {(n, key): safe_get_full_optimizer_state(p, key) for n, p in named.items() for key in MOMENTS}
    elif engine._cuts.held or engine._pipeline is not None:  # what torch gathers is then a part only
        return {}
    else:
        sharded = {name: p for name, p in named.items() if isinstance(p, DTensor)}
        state = engine._optimizer.state
        whole = {f"model/{name}": parameter.full_tensor() for name, parameter in sharded.items()}
        moments = {(n, key): state[p][key].full_tensor() for n, p in sharded.items() for key in MOMENTS}
    found = {**whole, **{f"optim/{name}/{key}": moment for (name, key), moment in moments.items()}}
    return {name: tensor.detach() for name, tensor in found.items()}


def differing(gathered: dict[str, torch.Tensor], directory: Path) -> list[str]:
    """Names whose stored content is not bit for bit what was gathered."""
    targets = {name: torch.full_like(tensor, torch.nan) for name, tensor in gathered.items()}
    if targets:
        pieces = [Piece(name, t, (0,) * t.dim(), tuple(t.shape)) for name, t in targets.items()]
        load(directory, pieces, only=["model/", "optim/"])
    return [name for name, tensor in gathered.items() if not torch.equal(tensor, targets[name])]


def resume(overrides: list[str], source: Path, again: Path, *, control: bool) -> dict[str, Any]:
    """Load under a layout, save at once, compare the first forward, and train on; the losses, and the control's."""
    started = start(overrides, seed=1)
    load(source, started.engine.pieces())
    started.engine.publish()
    save(again, STEPS, started.engine.pieces())
    same = torch.equal(started.logits(), start(overrides, full=source, seed=1).logits())
    found = {"same_forward": same, "losses": started.train(STEPS + 1, 2 * STEPS)}
    if control:
        load(source, started.engine.pieces())
        with torch.no_grad():
            for piece in started.engine.pieces():
                if isinstance(piece, Piece) and piece.name.endswith(("/exp_avg", "/exp_avg_sq")):
                    piece.tensor.zero_()
        started.engine.publish()
        found["control"] = started.train(STEPS + 1, 2 * STEPS)
    return found


def contents_differ(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not bit-equal in the newest generations of two directories."""
    readers = []
    for directory in (one, other):
        storage = FileStorage(directory)
        generation = newest(storage)
        assert generation is not None and generation.manifest is not None
        readers.append(GenerationReader(storage, generation.manifest))
    return [found.name for found in compare(*readers) if found.state != "equal"]


def furthest(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def work(rank: int, size: int, port: int, top: str, target: str, sources: list[str], precision: str) -> None:
    """One layout as the source, or as the target of several; rank 0 leaves what it found in a file."""
    warnings.filterwarnings("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    overrides = [*LAYOUTS[target][1], f"precision={precision}"]
    directory = Path(top, precision)
    if not sources:
        found: dict[str, Any] = train_and_save(overrides, directory / target)
    else:
        found = {
            source: resume(overrides, directory / source, directory / f"{source} to {target}", control=number == 0)
            for number, source in enumerate(sources)
        }
    if rank == 0:
        Path(top, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    leave()


def in_a_world(top: Path, target: str, sources: list[str], precision: str) -> dict[str, Any]:
    size = LAYOUTS[target][0]
    spawn(work, args=(size, free_port(), str(top), target, sources, precision), nprocs=size)  # type: ignore[no-untyped-call]
    found: dict[str, Any] = json.loads((top / "found.json").read_text())
    return found


def run(names: list[str], precision: str) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """A row a property, and for every pair of layouts how far its losses were."""
    uninterrupted = start([f"precision={precision}"]).train(1, 2 * STEPS)
    pairs, different, gathered, wrong, other_forward = {}, 0, 0, 0, 0
    trained, controls = [], []
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        for name in names:
            found = in_a_world(top, name, [], precision)
            trained.append(furthest(found["losses"], uninterrupted[:STEPS]))
            gathered, wrong = gathered + found["gathered"], wrong + len(found["wrong"])
        for target in names:
            sources = [source for source in names if source != target or len(names) == 1]
            found = in_a_world(top, target, sources, precision)
            pairs[target] = {s: furthest(found[s]["losses"], uninterrupted[STEPS:]) for s in sources}
            other_forward += sum(not found[source]["same_forward"] for source in sources)
            controls.append(furthest(found[sources[0]]["control"], uninterrupted[STEPS:]))
            for source in sources:
                different += len(contents_differ(top / precision / source, top / precision / f"{source} to {target}"))
            print(f"{precision}, into {target}: losses within {max(pairs[target].values()):.1e}", file=sys.stderr)
    bar, count = BARS[precision], sum(map(len, pairs.values()))
    furthest_pair = max(max(by_source.values()) for by_source in pairs.values())
    what = f"{precision}, {len(names)} layouts, {count} pairs"
    figures = [
        ("losses while training, from those of one process", "nats", max(trained), "lower", bar),
        ("losses after loading, from the uninterrupted run's", "nats", furthest_pair, "lower", bar),
        ("the same without Adam's moments", "nats", min(controls), "higher", 10 * bar),
        ("tensors that a re-save has otherwise", "tensors", different, "lower", 0),
        ("first forwards other than a fresh engine's", "forwards", other_forward, "lower", 0),
        (f"of {gathered} tensors stored otherwise than gathered", "tensors", wrong, "lower", 0),
    ]
    rows = [absolute(f"{what}: {name}", unit, x, better=better, bar=limit) for name, unit, x, better, limit in figures]
    return [replace(row, ok=row.ok if len(names) == len(LAYOUTS) else None) for row in rows], pairs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="which (default all)")
    parser.add_argument("--precision", nargs="+", choices=BARS, default=list(BARS), help="which (default both)")
    arguments = parser.parse_args()
    rows = [row for precision in arguments.precision for row in run(arguments.layouts, precision)[0]]
    return finish("matrix", rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
