"""One run from its configuration to its exit: read, start together, train, leave.

job.py reads and plans, in each process by itself; starting.py starts on all ranks together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import NoReturn

import torch

from checkpointing import PATIENCE, LeaseHeldError, Team
from checkpointing.printing import shown
from trainer.data.feed import Feed
from trainer.data.templates import chosen_template
from trainer.elastic.launcher import watching
from trainer.elastic.preemption import AGAIN, Preemption, warnings_of
from trainer.evaluation import Evaluation, TextWriter
from trainer.job import Job, read, say_plan
from trainer.loop import RunParts, train
from trainer.models import architecture, leave_description
from trainer.options.config import Config
from trainer.options.precision import Compute
from trainer.out_of_memory import explained
from trainer.outcome import Outcome, has_failed, leave
from trainer.parallel.engine import as_launched
from trainer.parallel.world import World, pick_device, process_group
from trainer.progress import Progress
from trainer.resume import become_itself, decide
from trainer.saver import Saver
from trainer.starting import Started, come_back, start_together, take_snapshots
from trainer.track.tracker import RunTracker
from trainer.training import Training
from trainer.utilization import full_speed

logger = logging.getLogger(__name__)


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
        watching(say_launcher_is_gone, partial(preemption.warn, Signals.SIGTERM)),
        joined(job, preemption),
        explained(config, device),
        ExitStack() as held,
    ):
        return train_together(start_together(job, plan, held), preemption)


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


def train_together(started: Started, preemption: Preemption) -> int:
    """Train while the processes are joined; the exit status. Nothing of it outlives the process group."""
    job = started.job
    evaluation = Evaluation(job.corpus.held_out, job.config.eval.samples, job.sets, writer_of(job, started.training))
    status = train_and_finish(started, evaluation, preemption)
    if status == 0 and evaluation.writer is not None:
        text = evaluation.writer.last or evaluation.write()  # as of a run that was finished before
        if text is not None and job.world.rank == 0:
            print(
                f"\nAfter this text the model writes:\n{shown(text[0])}\n--- goes on ---\n{shown(text[1])}", flush=True
            )
    return status


def train_and_finish(started: Started, evaluation: Evaluation, preemption: Preemption) -> int:
    """Bring the run directory to where training starts, and train to the end; the exit status."""
    job, start, config = started.job, started.start, started.job.config
    done = Progress.of(started.state, scaled=config.precision.compute is Compute.fp16)
    if not start.own:
        done.best_loss, done.since_best = None, 0
    # A branch of another run is a run of its own.
    own_id = started.state.get("run_id")
    run_id = Team().together(lambda: become_itself(config, start.own, own_id) if job.world.rank == 0 else None)[0]
    for line in come_back(config, start, done.step, job.world, started.memory):
        if job.world.rank == 0:
            print(f"  {'start':10} {shown(line)}", flush=True)
    describe(job)
    status = 1
    with ExitStack() as opened:
        tracker = tracker_of(started, run_id, done.step)
        opened.callback(lambda: tracker.close(status))
        try:
            begin(tracker, started, run_id)
            saver = saver_of(started, tracker, run_id, done.step, opened, lambda: status == 0)
            preemption.give_up = partial(give_up, tracker, saver, done)
            parts = RunParts(config, started.training, feed_of(job, started.training), evaluation, tracker, saver)
            if train(parts, done, preemption, job.before_step):
                tracker.emit("finish", step=done.step)
                status = 0
                finish(job, evaluation, tracker, done)
            else:
                status = AGAIN
                leave_preempted(job, tracker, done, preemption)
        except LeaseHeldError:
            raise
        except Exception as error:
            tracker.emit("failure", step=done.step, reason=f"{type(error).__name__}: {error}")
            raise
    if status == AGAIN:
        # A launcher ends the others when the first has left, also one that still uploads what it logged.
        Team().together(lambda: None)
    return status


def describe(job: Job) -> None:
    """Leave, on rank 0, what an export needs beside the weights. An export is no reason not to train."""
    if job.world.rank == 0:
        try:
            template, place = chosen_template(job.config.data), Path(job.config.run.dir) / "hf"
            leave_description(job.config.model, job.shapes, job.tokenizer, template, place, job.corpus.endings)
        except Exception as error:  # of libraries and of models' own code
            logger.warning("%s/hf is not whole, and an export will need --config: %s", job.config.run.dir, error)


def tracker_of(started: Started, run_id: str, step: int) -> RunTracker:
    """The run's tracker, which goes on after `step`."""
    job, start, config = started.job, started.start, started.job.config
    compute, peak = config.precision.compute, config.tracking.peak_tflops
    speed = full_speed(job.shapes, config.train.seq_len, job.device, compute, peak)
    return RunTracker(
        config,
        run_id,
        job.world.rank,
        start.incarnation,
        step,
        speed,
        altered=start.altered,
        leases=started.leases,
    )


def saver_of(
    started: Started,
    tracker: RunTracker,
    run_id: str,
    step: int,
    opened: ExitStack,
    finished: Callable[[], bool],
) -> Saver:
    """The run's saver, with what takes its snapshots, which ends with `opened`: for good where it has `finished`."""
    job, start = started.job, started.start
    snapshots = take_snapshots(started, run_id)
    if snapshots is not None:
        opened.callback(lambda: snapshots.close(finished=finished()))
    return Saver(
        job.config,
        started.training,
        tracker,
        run_id,
        start.incarnation,
        job.corpus.train.fingerprint,
        architecture(job.shapes),
        started.leases,
        snapshots,
        durable_step=step if started.tier == "durable" and start.own else -1,
    )


def feed_of(job: Job, training: Training) -> Feed:
    """This rank's share of every batch."""
    train = job.config.train
    return Feed(
        job.corpus.train,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        seed=train.seed,
        pad=job.tokenizer.eos,
        num_ranks=training.data_size,
        rank=training.data_rank,
        order=job.config.data.order,
    )


def finish(job: Job, evaluation: Evaluation, tracker: RunTracker, done: Progress) -> None:
    """Record the text that the model of a finished run writes, and say why it ended early."""
    if (text := evaluation.write()) is not None:
        tracker.sample(done.step, *text)
    if done.step < job.config.train.steps and job.world.rank == 0:
        print(
            f"  {'ended':10} after step {done.step}: the loss on held-out samples was not below "
            f"{done.best_loss:.4f} in {done.since_best} evaluations"
        )


def leave_preempted(job: Job, tracker: RunTracker, done: Progress, preemption: Preemption) -> None:
    """Record that a run leaves before its end, and say how it goes on."""
    tracker.emit("preempt", step=done.step, signal=Signals(preemption.signum).name)
    leave(Outcome(AGAIN, final=False, why=f"preempted after step {done.step}", saved=True))
    if job.world.rank == 0:
        where = f"after step {done.step}, which is saved" if done.step else "before the first step"
        again = "" if job.config.resume == "auto" else f", without resume={job.config.resume}"
        print(f"  {'preempted':10} {where}. Run the same command again{again}.")


def writer_of(job: Job, training: Training) -> TextWriter | None:
    options, corpus = job.config.eval, job.corpus
    if not options.generate_tokens:
        return None
    room = getattr(getattr(job.shapes, "config", None), "max_position_embeddings", None) or sys.maxsize
    dataset = corpus.held_out if len(corpus.held_out) else corpus.train
    return TextWriter(training, job.tokenizer, dataset, options.generate_tokens, job.config.train.seed, room)


def begin(tracker: RunTracker, started: Started, run_id: str) -> None:
    """Record how the run starts."""
    state, world_size = started.state, started.job.world.size
    facts = {"incarnation": started.start.incarnation, "world_size": world_size, "run_id": run_id}
    if not state:
        tracker.emit("start", step=0, **facts)
        return
    tracker.emit("resume", step=state["step"], tier=started.tier, **facts)
    if (was := state.get("world_size", world_size)) != world_size:
        tracker.emit("resize", step=state["step"], was=was, world_size=world_size)


def say_launcher_is_gone() -> None:
    """Say it once a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("trainer: what started this run is gone: it saves and ends", file=sys.stderr, flush=True)


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
