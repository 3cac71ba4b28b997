"""One run from its configuration to its exit: read, plan, join the others, restore, train, leave.

Whatever one process can refuse by itself it refuses in `read` and `decide`, before any process group starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

import torch
from torch import nn

from checkpointing import CheckpointError, DamagedError, LeaseHeldError, MismatchError, UnreadableError, load
from checkpointing.collective import Team
from checkpointing.foreign import IMPORTED
from checkpointing.memory import Snapshotter
from checkpointing.memory.client import ensure_keeper
from checkpointing.memory.directory import why_not_private
from checkpointing.memory.mapped import MappedStorage
from checkpointing.patience import PATIENCE
from checkpointing.printing import shown
from checkpointing.storage import FileStorage
from trainer.data.dataset import Dataset
from trainer.data.feed import Feed
from trainer.data.order import steps_of
from trainer.data.sources import Corpus, load_corpus, load_sets
from trainer.data.templates import chosen_template
from trainer.data.tokenizer import Tokenizer
from trainer.elastic.launcher import watching
from trainer.elastic.preemption import AGAIN, Preemption, warnings_of
from trainer.errors import AlsoRefused, Refused
from trainer.evaluation import Evaluation, Writer
from trainer.exhausted import explained, remedies
from trainer.loop import train
from trainer.memory import footprint, plan_memory
from trainer.methods import build, build_largest
from trainer.models import architecture, check_packing, leave_description, load_tokenizer
from trainer.optimizers import optimizer_of, suits
from trainer.optimizers.groups import lr_scales
from trainer.options.config import Config
from trainer.options.precision import Compute
from trainer.outcome import Outcome, has_failed, leave
from trainer.parallel.auto import Cluster, choose, memory_of
from trainer.parallel.compiling import check_compiling
from trainer.parallel.engine import as_launched, find_topology
from trainer.parallel.pipeline import check_stages, is_stageable
from trainer.parallel.tensor import check_splittable, is_splittable
from trainer.parallel.world import World, pick_device, process_group
from trainer.plan import Topology, describe_run, plan_batch
from trainer.progress import Progress
from trainer.resume import (
    Start,
    become_itself,
    cannot_read,
    check_state,
    decide,
    make_memory_directory,
    memory_directory,
    trainer_state,
    turn_away_from,
)
from trainer.rundir import Leases, bring_back, hold_run_directory
from trainer.saving import Saver
from trainer.schedule import never_reached
from trainer.track.tracker import RunTracker, where_figures_go
from trainer.training import Training, make_training
from trainer.utilization import full_speed

logger = logging.getLogger(__name__)


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


def run(config: Config, before_step: Callable[[int], None] | None = None) -> int:
    """Train as configured; returns the exit status. `Refused` if it cannot be done.

    `before_step` is called with the number of every step that is about to begin; what it raises ends the run.
    """
    world = World.from_environment()
    device = pick_device(world)
    config = as_launched(config)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS cannot be deterministic
        torch.use_deterministic_algorithms(True)
    job, plan = read(config, world, device)
    job = replace(job, before_step=before_step)
    config = job.config
    if config.dry_run:
        if world.rank == 0:
            start = decide(config, job.corpus.train.fingerprint, job.shapes)
            say_plan(config, [*plan, *(("start", line) for line in start.lines)])
        return 0
    preemption = Preemption(config.elastic.grace_s, partial(end_at_once, AGAIN))
    with (
        preemption.listening(warnings_of(config.elastic.signal)),
        watching(partial(leave_with_launcher, preemption)),
        joined(job, preemption),
        explained(config, device),
        ExitStack() as held,
    ):
        start, leases = begin_together(job, plan, held)
        return train_together(job, start, leases, preemption)


@contextlib.contextmanager
def joined(job: Job, preemption: Preemption) -> Iterator[None]:
    """The processes joined. One that is told to end before that ends at once where another one has failed already."""
    preemption.ends_at_once = has_failed
    options = job.config.elastic
    PATIENCE.seconds = options.patience_s
    alone = job.config.parallel.uses_deepspeed
    with process_group(job.world, job.device, alone=alone, timeout_s=options.timeout_s):
        preemption.ends_at_once = lambda: False
        yield


def begin_together(job: Job, plan: list[tuple[str, str]], held: ExitStack) -> tuple[Start, Leases | None]:
    """Rank 0 takes the run directory until `held` ends, and decides where to start. What it refuses, all refuse."""
    config, start, leases = job.config, Start(), None  # the other ranks learn rank 0's decision with all the rest
    refused: list[Refused] = []

    def begin() -> str | None:
        nonlocal start, leases
        if job.world.rank == 0:
            try:
                leases = held.enter_context(hold_run_directory(config, job.world))
                start = decide(config, job.corpus.train.fingerprint, job.shapes)
                say_plan(config, [*plan, *(("start", line) for line in start.lines)])
            except Refused as error:
                refused.append(error)
                return str(error)
        return None

    why = Team().together(begin, long=True)[0]
    if why is not None:
        raise refused[0] if refused else AlsoRefused(why)
    return start, leases


def read(config: Config, world: World, device: torch.device) -> tuple[Job, list[tuple[str, str]]]:
    """Read the data and work out the plan, as (label, text) lines."""
    if not config.parallel.auto:
        find_topology(config, world, device)  # refused before anything is read
    check_compiling(config, device)
    tokenizer = load_tokenizer(config.model)
    corpus = load_corpus(config.data, tokenizer, config.train.seq_len)
    sets = load_sets(config.eval.sets, config.data, tokenizer, config.train.seq_len)
    if config.train.epochs is not None:
        size, ratio = len(corpus.train), config.data.ratio
        steps = steps_of(config.train.epochs, dataset_size=size, global_batch=config.train.global_batch, ratio=ratio)
        config = replace(config, train=replace(config.train, steps=steps))
    model = build(config, "meta")
    check_vocabulary([corpus.train, corpus.held_out, *sets.values()], model, tokenizer.eos)
    if config.data.pack:
        check_packing(model)
    lr_scales(model, config.optimizer)
    sizes, why = footprint(config, build_largest(config)), list[str]()
    optimizer = optimizer_of(config)
    if config.parallel.auto:
        cluster = Cluster(world.size, world.local_size, memory_of(device, world.local_size))
        schedule = config.parallel.pp_schedule
        config, why = choose(
            config,
            sizes,
            cluster,
            lambda size: is_splittable(model, size) and suits(optimizer, model, Topology(tp=size)),
            lambda size: is_stageable(model, size, schedule),
        )
    topology = find_topology(config, world, device)
    batch = plan_batch(config, topology.data_size)
    if topology.tp > 1:
        check_splittable(model, topology.tp)
        optimizer.refuse(model, topology)
    if topology.pp > 1:
        check_stages(model, topology.pp, config.parallel.pp_schedule)
    memory = plan_memory(config, sizes, topology, batch.rounds)
    epoch = len(corpus.train) * config.data.ratio / config.train.global_batch
    held_out = f"{len(corpus.held_out):,} held out"
    plan = describe_run(config, model, topology, batch, memory, device.type, optimizer.about(model))
    plan.insert(1, ("data", f"{corpus.name}: {len(corpus.train):,} samples ({epoch:,.1f} steps an epoch), {held_out}"))
    plan += [("data", note) for note in corpus.notes]
    plan += [("data", f"eval_loss/{name} on {len(dataset):,} samples") for name, dataset in sets.items()]
    plan += [("layout", line) for line in why]
    if where := where_figures_go(config):
        plan.append(("tracking", where))
    if said := never_reached(config.train.steps, config.optimizer.lr, config.schedule):
        plan.append(("schedule", said))
    if memory.total > (room := memory_of(device, world.local_size)):
        plan.append(
            (
                "memory",
                f"a process has {room / 1e9:.1f} GB here, which is less than it is expected to need. What takes less: "
                + "; ".join(remedies(config)),
            )
        )
    return Job(config, world, device, topology, tokenizer, corpus, sets, model), plan


def say_plan(config: Config, lines: list[tuple[str, str]]) -> None:
    print(f"{config.run.name} in {config.run.dir}")
    print("\n".join(f"  {label:10} {shown(text)}" for label, text in lines), flush=True)


def train_together(job: Job, start: Start, leases: Leases | None, preemption: Preemption) -> int:
    """Train while the processes are joined; the exit status. Nothing of it outlives the process group."""
    start = agree(job, start)
    memory = prepare_memory(job)
    # The model is not held here: what an engine makes shards of is given back.
    training = make_training(
        job.config,
        build(job.config, sizes=start.sizes, team=Team()),
        job.topology,
        job.world,
        job.device,
        start.sizes,
    )
    state, tier = restore(training, start, memory)
    if (
        state and state["step"] != start.step and IMPORTED not in state
    ):  # an older generation than the one that was checked
        check_state(job.config, state, job.corpus.train.fingerprint, job.shapes)
    evaluation = Evaluation(job.corpus.held_out, job.config.eval.samples, job.sets, writer_of(job, training))
    status = train_and_finish(job, start, memory, training, evaluation, state, tier, leases, preemption)
    if status == 0 and evaluation.writer is not None:
        text = evaluation.writer.last or evaluation.write()  # as of a run that was finished before
        if text is not None and job.world.rank == 0:
            print(
                f"\nAfter this text the model writes:\n{shown(text[0])}\n--- goes on ---\n{shown(text[1])}", flush=True
            )
    return status


def writer_of(job: Job, training: Training) -> Writer | None:
    options, corpus = job.config.eval, job.corpus
    if not options.generate_tokens:
        return None
    room = getattr(getattr(job.shapes, "config", None), "max_position_embeddings", None) or sys.maxsize
    dataset = corpus.held_out if len(corpus.held_out) else corpus.train
    return Writer(training, job.tokenizer, dataset, options.generate_tokens, job.config.train.seed, room)


def agree(job: Job, start: Start) -> Start:
    """Check that all ranks read the same data, and take rank 0's decision where to start."""
    team = Team()
    layouts = team.together(lambda: str(job.config.parallel))
    if others := [rank for rank, layout in enumerate(layouts) if layout != layouts[0]]:
        raise Refused(
            f"Rank {others[0]} would compute under {layouts[others[0]]}, and rank 0 under {layouts[0]}. "
            "Machines with different memory choose differently: type the degrees instead of parallel=auto."
        )
    read = [job.corpus.train, job.corpus.held_out, *job.sets.values()]
    fingerprints = team.together(lambda: [dataset.fingerprint for dataset in read])
    if others := [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]:
        raise Refused(
            f"Ranks {others} read other data than rank 0. Every machine needs the same files (and for data=stdlib the "
            "same release of Python)."
        )
    return Start(**team.together(lambda: asdict(start))[0])


def restore(training: Training, start: Start, memory: Path | None) -> tuple[dict[str, Any], str]:
    """Fill the engine from where the run starts; the trainer's state there, empty from scratch, and its tier."""
    if not start.directories:
        return {}, ""
    found: list[str] = []
    directories = start.directories
    whys = Team().together(lambda: why_not_private(memory) if memory is not None and memory.is_dir() else "")
    if why := next((why for why in whys if why), ""):  # rank 0's own was looked at before it was read
        logger.warning("passing over what is in memory: %s", why)
        directories = [one for one in directories if one != start.memory]
        if not directories:
            raise Refused(f"The run could go on from memory alone, and {why}. Type resume=none to start over.")
    tiers = [MappedStorage(one) if one == start.memory else FileStorage(one) for one in directories]
    try:
        objects = load(
            tiers,
            training.pieces_for,
            generation=start.generation,
            only=None if start.state.get(IMPORTED, {}).get("optimizer", True) else ["model/", "buffer/"],
            chosen=lambda tier, _: found.append(str(tier)),
        )
    except UnreadableError as error:
        raise cannot_read(error) from error
    except (MismatchError, DamagedError) as error:
        raise Refused(
            f"The run cannot go on from {' and '.join(directories)}: {error} Give another checkpoint, or resume=none."
        ) from error
    training.publish()
    state = trainer_state(objects)
    assert isinstance(state, dict)
    return state, "memory" if found[0] == start.memory else "durable"


def train_and_finish(
    job: Job,
    start: Start,
    memory: Path | None,
    training: Training,
    evaluation: Evaluation,
    state: dict[str, Any],
    tier: str,
    leases: Leases | None,
    preemption: Preemption,
) -> int:
    """Bring the run directory to where training starts, and train to the end; the exit status."""
    config, world = job.config, job.world
    done = Progress.of(state, scaled=config.precision.compute is Compute.fp16)
    if not start.own:
        done.best_loss, done.since_best = None, 0
    # A branch of another run is a run of its own.
    run_id = Team().together(
        lambda: become_itself(config, start.own, state.get("run_id")) if world.rank == 0 else None
    )[0]
    for line in come_back(config, start, done.step, world, memory):
        if world.rank == 0:
            print(f"  {'start':10} {shown(line)}", flush=True)
    if world.rank == 0:
        try:
            template = chosen_template(config.data)
            place = Path(config.run.dir) / "hf"
            leave_description(config.model, job.shapes, job.tokenizer, template, place, job.corpus.endings)
        except Exception as error:  # of libraries and of models' own code: an export is no reason not to train
            logger.warning("%s/hf is not whole, and an export will need --config: %s", config.run.dir, error)
    compute, peak = config.precision.compute, config.tracking.peak_tflops
    speed = full_speed(job.shapes, config.train.seq_len, job.device, compute, peak)
    tracker = RunTracker(
        config, run_id, world.rank, start.incarnation, done.step, speed, altered=start.altered, leases=leases
    )
    status = 1
    with ExitStack() as opened:
        opened.callback(lambda: tracker.close(status))
        try:
            begin(tracker, state, start.incarnation, world.size, run_id, tier)
            snapshots = take_snapshots(config, training, run_id, start.incarnation, memory, leases)
            if snapshots is not None:
                opened.callback(lambda: snapshots.close(finished=status == 0))
            saver = Saver(
                config,
                training,
                tracker,
                run_id,
                start.incarnation,
                job.corpus.train.fingerprint,
                architecture(job.shapes),
                leases,
                snapshots,
                durable_step=done.step if tier == "durable" and start.own else -1,
            )
            feed = Feed(
                job.corpus.train,
                global_batch=config.train.global_batch,
                micro_batch=config.train.micro_batch,
                seed=config.train.seed,
                pad=job.tokenizer.eos,
                num_ranks=training.data_size,
                rank=training.data_rank,
                order=config.data.order,
            )
            preemption.give_up = partial(give_up, tracker, saver, done)
            if train(config, training, feed, evaluation, tracker, saver, done, preemption, job.before_step):
                tracker.emit("finish", step=done.step)
                status = 0
                if (text := evaluation.write()) is not None:
                    tracker.sample(done.step, *text)
                if done.step < config.train.steps and world.rank == 0:
                    print(
                        f"  {'ended':10} after step {done.step}: the loss on held-out samples was not below "
                        f"{done.best_loss:.4f} in {done.since_best} evaluations"
                    )
            else:
                status = AGAIN
                tracker.emit("preempt", step=done.step, signal=Signals(preemption.signum).name)
                leave(Outcome(status, final=False, why=f"preempted after step {done.step}", saved=True))
                if world.rank == 0:
                    where = f"after step {done.step}, which is saved" if done.step else "before the first step"
                    again = "" if config.resume == "auto" else f", without resume={config.resume}"
                    print(f"  {'preempted':10} {where}. Run the same command again{again}.")
        except LeaseHeldError:
            raise
        except Exception as error:
            tracker.emit("failure", step=done.step, reason=f"{type(error).__name__}: {error}")
            raise
    if status == AGAIN:
        # A launcher ends the others when the first has left, also one that still uploads what it logged.
        Team().together(lambda: None)
    return status


def leave_with_launcher(preemption: Preemption) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("trainer: what started this run is gone: it saves and ends", file=sys.stderr, flush=True)
    preemption.warn(Signals.SIGTERM)


def give_up(tracker: RunTracker, saver: Saver, done: Progress, why: str) -> None:
    """Leave in the middle of whatever is being done. Nothing committed is touched."""
    if saver.durable_step == done.step:
        end_at_once(AGAIN, why, saved=True)
    with contextlib.suppress(Exception):  # the trainer may be writing this very moment
        tracker.emit("preempt", step=done.step, abandoned=why)
    end_at_once(AGAIN, f"{why}, and step {done.step} is not saved. The run goes on from what was saved before")


def end_at_once(status: int, why: str, *, saved: bool = False) -> NoReturn:
    """End the process from another thread, whatever the main one does."""
    print(f"trainer: preempted: {why}.", file=sys.stderr, flush=True)
    leave(Outcome(status, final=False, why=f"preempted: {why}", saved=saved))
    os._exit(status)


def come_back(config: Config, start: Start, step: int, world: World, memory: Path | None) -> list[str]:
    """Undo what lies after `step`: in the memory of every node, and then in the run directory. Collective."""

    def forget() -> None:
        if world.local_rank == 0 and memory is not None and memory.is_dir() and not why_not_private(memory):
            turn_away_from([MappedStorage(memory)], start, step)

    Team().together(forget)
    lines: list[str] = Team().together(lambda: bring_back(config, start, step) if world.rank == 0 else [])[0]
    return lines


def prepare_memory(job: Job) -> Path | None:
    """The run's directory in memory, the same on all nodes, if it has one or wants snapshots. Collective.

    Where snapshots are wanted its keeper starts now, while the engine is made.
    """
    config, world = job.config, job.world
    every = config.checkpoint.memory.every

    def find() -> str:
        found = make_memory_directory(config) if every else memory_directory(config)
        return "" if found is None else str(found)

    told = Team().together(lambda: find() if world.rank == 0 else "")[0]
    memory = Path(told) if told else None
    if every and memory is not None and world.local_rank == 0:
        with contextlib.suppress(CheckpointError, OSError):  # said when snapshots are to be taken
            ensure_keeper(memory, config.checkpoint.memory.keep_s)
    return memory


def take_snapshots(
    config: Config,
    training: Training,
    run_id: str,
    incarnation: int,
    memory: Path | None,
    leases: Leases | None,
) -> Snapshotter | None:
    """Make ready for the run's snapshots in memory; None where none are wanted. Collective."""
    options = config.checkpoint.memory
    if options.every == 0 or memory is None:
        return None
    snapshots: Snapshotter | None = None
    try:
        snapshots = Snapshotter(
            config.checkpoint.dir,
            memory,
            run_id=run_id,
            incarnation=incarnation,
            keep_s=options.keep_s,
            start_s=options.start_s,
            rate=options.flush_rate,
            check_fence=options.check_fence,
            lease=None if leases is None else leases.checkpoints,
        )
        snapshots.prepare(training.pieces())
    except (CheckpointError, OSError) as error:
        if snapshots is not None:
            snapshots.close()
        raise Refused(
            f"Snapshots in memory cannot be taken: {error} Type checkpoint.memory.every=0 to train without them, or "
            "checkpoint.memory.dir=DIRECTORY with more room."
        ) from error
    return snapshots


def begin(
    tracker: RunTracker, state: dict[str, Any], incarnation: int, world_size: int, run_id: str, tier: str
) -> None:
    """Record how the run starts; `state` is empty from scratch."""
    facts = {"incarnation": incarnation, "world_size": world_size, "run_id": run_id}
    if not state:
        tracker.emit("start", step=0, **facts)
        return
    tracker.emit("resume", step=state["step"], tier=tier, **facts)
    if (was := state.get("world_size", world_size)) != world_size:
        tracker.emit("resize", step=state["step"], was=was, world_size=world_size)


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
