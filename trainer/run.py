"""One run from its configuration to its exit: plan, join the others, restore, train, leave.

Everything that can be refused is refused in `prepare`, before any process group starts.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpointing import DamagedError, LeaseHeldError, MismatchError, load
from checkpointing.collective import Team
from checkpointing.lease import Lease
from checkpointing.retention import clear_leftovers
from checkpointing.storage import FileStorage
from trainer.config import Config, as_yaml
from trainer.data.feed import Feed
from trainer.data.sources import Corpus, load_corpus
from trainer.data.tokenizer import Tokenizer
from trainer.errors import Refused
from trainer.loop import Progress, train
from trainer.methods import apply_method
from trainer.models import build_model, load_tokenizer
from trainer.parallel.engine import TrainingEngine, make_engine
from trainer.parallel.torch_engine import blocks
from trainer.parallel.world import World, pick_device, process_group
from trainer.plan import BatchPlan, Topology, describe_run, plan_batch, plan_memory, resolve_topology
from trainer.resume import Start, decide, turn_away_from
from trainer.sample import sample_text
from trainer.saving import Saver
from trainer.track.files import roll_back
from trainer.track.tracker import RunTracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What is known before the processes join."""

    topology: Topology
    tokenizer: Tokenizer
    corpus: Corpus
    start: Start  # on rank 0; the others learn it when they have joined
    plan: list[tuple[str, str]]


def run(config: Config) -> int:
    """Train as configured; returns the exit status. `Refused` if it cannot be done."""
    world = World.from_environment()
    device = pick_device(world)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS cannot be deterministic
        torch.use_deterministic_algorithms(True)
    topology = resolve_topology(config.parallel, world.size)
    batch = plan_batch(config, topology.data_size)
    with run_lease(config, world) as lease:
        prepared = prepare(config, world, device, topology, batch)
        if world.rank == 0:
            print(f"{config.run.name} in {config.run.dir}")
            print("\n".join(f"  {label:10} {text}" for label, text in prepared.plan), flush=True)
        if config.dry_run:
            return 0
        with process_group(world, device):
            train_together(config, world, device, prepared, lease)
    return 0


def train_together(config: Config, world: World, device: torch.device, prepared: Prepared, lease: Lease | None) -> None:
    """What happens while the processes are joined. Nothing of it outlives the process group."""
    start = agree(prepared)
    engine = make_engine(config, build(config), prepared.topology, world, device)
    state = restore(engine, start)
    train_and_finish(config, world, prepared, start, engine, state, lease)


def prepare(config: Config, world: World, device: torch.device, topology: Topology, batch: BatchPlan) -> Prepared:
    """Read the data, decide where to start, and work out the plan; all that one process can check by itself."""
    tokenizer = load_tokenizer(config.model)
    corpus = load_corpus(config.data, tokenizer, config.train.seq_len)
    model = build(config, "meta")
    check_vocabulary(corpus, model)
    start = decide(config, corpus.train.fingerprint, model) if world.rank == 0 else Start()
    memory = plan_memory(config, model, topology, max(map(count, blocks(model)), default=count(model)))
    epoch = len(corpus.train) / config.train.global_batch
    held_out = f"{len(corpus.held_out):,} held out"
    plan = describe_run(config, model, topology, batch, memory, device.type)
    plan.insert(1, ("data", f"{corpus.name}: {len(corpus.train):,} samples ({epoch:,.1f} steps an epoch), {held_out}"))
    plan += [("data", note) for note in corpus.notes]
    plan += [("start", line) for line in start.lines]
    return Prepared(topology, tokenizer, corpus, start, plan)


def agree(prepared: Prepared) -> Start:
    """Check that all ranks read the same data, and take rank 0's decision where to start."""
    team = Team()
    fingerprints = team.together(lambda: [prepared.corpus.train.fingerprint, prepared.corpus.held_out.fingerprint])
    if others := [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]:
        raise Refused(
            f"Ranks {others} read other data than rank 0. Every machine needs the same files (and for data=stdlib the "
            "same release of Python)."
        )
    return Start(**team.together(lambda: asdict(prepared.start))[0])


def restore(engine: TrainingEngine, start: Start) -> dict[str, Any]:
    """Fill the engine from where the run starts; the trainer's state there, empty from scratch."""
    if start.directory is None:
        return {}
    try:
        objects = load(start.directory, engine.pieces(), generation=start.generation)
    except (MismatchError, DamagedError) as error:
        raise Refused(
            f"The run cannot go on from {start.directory}: {error} Give another checkpoint, or resume=none."
        ) from error
    engine.publish()
    state = objects["trainer"]
    assert isinstance(state, dict)
    return state


def train_and_finish(
    config: Config,
    world: World,
    prepared: Prepared,
    start: Start,
    engine: TrainingEngine,
    state: dict[str, Any],
    lease: Lease | None,
) -> None:
    """Bring the run directory to where training starts, train, and show what the model writes."""
    progress = Progress(state.get("step", 0), state.get("tokens", 0))
    run_id = Team().together(lambda: state.get("run_id") or uuid.uuid4().hex[:8])[0]
    if world.rank == 0:
        enter_run_directory(config, start, progress.step)
    tracker = RunTracker(config, run_id, world.rank)
    status = 1
    try:
        if state:
            tracker.emit(
                "resume", step=progress.step, tier="durable", incarnation=start.incarnation, world_size=world.size
            )
            if state["world_size"] != world.size:
                tracker.emit("resize", step=progress.step, was=state["world_size"], world_size=world.size)
        else:
            tracker.emit("start", step=0, incarnation=start.incarnation, world_size=world.size)
        fingerprint = prepared.corpus.train.fingerprint
        saver = Saver(config, engine, tracker, run_id, start.incarnation, fingerprint, lease)
        feed = Feed(
            prepared.corpus.train,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            seed=config.train.seed,
            pad=prepared.tokenizer.eos,
            num_ranks=engine.data_size,
            rank=engine.data_rank,
        )
        train(config, engine, feed, prepared.corpus.held_out, tracker, saver, progress)
        tracker.emit("finish", step=progress.step)
        status = 0
    except Exception as error:
        tracker.emit("failure", step=progress.step, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        tracker.close(status)
    show_sample(config, world, prepared, engine)


def show_sample(config: Config, world: World, prepared: Prepared, engine: TrainingEngine) -> None:
    if config.eval.generate_tokens == 0:
        return
    dataset = prepared.corpus.held_out if len(prepared.corpus.held_out) else prepared.corpus.train
    prompt, text = sample_text(engine, prepared.tokenizer, dataset, config.eval.generate_tokens, config.train.seed)
    if world.rank == 0:
        print(f"\nAfter this held-out text the model writes:\n{prompt}\n--- goes on ---\n{text}", flush=True)


def build(config: Config, device: str = "cpu") -> nn.Module:
    """The model with its method, its values a function of the seed; on `meta` its shapes only."""
    model = build_model(config.model, seq_len=config.train.seq_len, seed=config.train.seed, device=device)
    return apply_method(model, config.method, seed=config.train.seed)


def check_vocabulary(corpus: Corpus, model: nn.Module) -> None:
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # every transformers model has it
    if (largest := max(corpus.train.largest_token, corpus.held_out.largest_token)) >= size:
        raise Refused(
            f"The data holds token {largest}, and the model knows {size} tokens. Give the model its own tokenizer."
        )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@contextmanager
def run_lease(config: Config, world: World) -> Iterator[Lease | None]:
    """Rank 0 holds the run directory, so that no second run writes into it. A dry run neither holds nor writes."""
    if world.rank != 0 or config.dry_run:
        yield None
        return
    make_run_directory(config)
    try:
        lease = Lease.acquire(FileStorage(Path(config.run.dir) / ".lease"))
    except LeaseHeldError as error:
        raise Refused(
            f"Another run uses {config.run.dir}: {error}. Wait until it has ended or stop it, or type another run.name."
        ) from None
    try:
        yield lease
    finally:
        lease.release()


def make_run_directory(config: Config) -> None:
    for directory in (Path(config.run.dir), Path(config.checkpoint.dir)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".write-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            why = error.strerror or str(error)
            raise Refused(f"{directory} cannot be written: {why}. Type run.dir=DIRECTORY with one that can.") from None


def enter_run_directory(config: Config, start: Start, step: int) -> None:
    """Bring files of an earlier incarnation back to `step`; for rank 0, under the lease."""
    run_dir = Path(config.run.dir)
    if step != start.step:
        print(f"  start      the newest generation could not be read: going on from step {step}", flush=True)
    if discarded := roll_back(run_dir, step):
        print(
            f"  start      {discarded} steps after step {step} are rolled back, to metrics.discarded.jsonl", flush=True
        )
    turn_away_from(config, start, step)
    for name in clear_leftovers(FileStorage(config.checkpoint.dir)):
        logger.info("cleared %s, which a save left behind that never committed", name)
    (run_dir / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
