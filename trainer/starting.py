"""The start of a run on all ranks together: who holds its directory, where it goes on, and its state from there."""

from __future__ import annotations

import contextlib
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpointing import (
    IMPORTED,
    CheckpointError,
    DamagedError,
    MappedStorage,
    MismatchError,
    Snapshotter,
    Team,
    UnreadableError,
    ensure_keeper,
    load,
    open_storage,
    why_not_private,
)
from trainer.allowed_changes import check_state
from trainer.errors import AlsoRefused, Refused
from trainer.job import Job, Lines, say_plan
from trainer.methods import build
from trainer.options.config import Config
from trainer.parallel.world import World
from trainer.resume import (
    Start,
    cannot_read,
    decide,
    make_memory_directory,
    memory_directory,
    trainer_state,
    turn_away_from,
)
from trainer.rundir import Leases, bring_back, hold_run_directory
from trainer.training import Training, make_training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """A run that all ranks have started together, and that has its state."""

    job: Job
    start: Start
    leases: Leases | None  # held by rank 0, None elsewhere
    memory: Path | None  # its directory in memory, if it has one
    training: Training
    state: dict[str, Any]  # the trainer's, as saved; empty from scratch
    tier: str  # which the state came from: memory or durable


def start_together(job: Job, plan: Lines, held: ExitStack) -> Started:
    """Take the run directory until `held` ends, decide where to start, and load the state. Collective."""
    start, leases = begin_together(job, plan, held)
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
    # An older generation than the one that was checked?
    if state and state["step"] != start.step and IMPORTED not in state:
        check_state(job.config, state, job.corpus.train.fingerprint, job.shapes)
    return Started(job, start, leases, memory, training, state, tier)


def begin_together(job: Job, plan: Lines, held: ExitStack) -> tuple[Start, Leases | None]:
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
    tiers = [MappedStorage(one) if one == start.memory else open_storage(one) for one in directories]
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


def take_snapshots(started: Started, run_id: str) -> Snapshotter | None:
    """Make ready for the run's snapshots in memory; None where none are wanted. Collective."""
    config, memory, leases = started.job.config, started.memory, started.leases
    options = config.checkpoint.memory
    if options.every == 0 or memory is None:
        return None
    snapshots: Snapshotter | None = None
    try:
        snapshots = Snapshotter(
            config.checkpoint.dir,
            memory,
            run_id=run_id,
            incarnation=started.start.incarnation,
            keep_s=options.keep_s,
            start_s=options.start_s,
            rate=options.flush_rate,
            check_fence=options.check_fence,
            lease=None if leases is None else leases.checkpoints,
        )
        snapshots.prepare(started.training.pieces())
    except (CheckpointError, OSError) as error:
        if snapshots is not None:
            snapshots.close()
        raise Refused(
            f"Snapshots in memory cannot be taken: {error} Type checkpoint.memory.every=0 to train without them, or "
            "checkpoint.memory.dir=DIRECTORY with more room."
        ) from error
    return snapshots
