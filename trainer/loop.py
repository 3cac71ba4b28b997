"""The training loop and what happens between steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpointing import Team
from trainer.data.feed import Feed, StepShare
from trainer.elastic.preemption import Preemption
from trainer.elastic.randomness import derive
from trainer.errors import TrainingFailed
from trainer.evaluation import Evaluation
from trainer.footprint import memory_used
from trainer.options.config import Config
from trainer.profiling import Window
from trainer.progress import LossScale, Progress
from trainer.saver import Saver
from trainer.schedule import learning_rate
from trainer.track.tracker import RunTracker
from trainer.training import Training


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that its loop puts to work."""

    config: Config
    training: Training
    feed: Feed
    evaluation: Evaluation
    tracker: RunTracker
    saver: Saver


def train(
    parts: RunParts, done: Progress, preemption: Preemption, before_step: Callable[[int], None] | None = None
) -> bool:
    """Train from where `done` stands to the last step, reporting and saving on the way; whether it came so far.

    After a warning the step that was under way is the last one, and is saved. With `eval.patience` the run ends sooner
    where the held-out loss does not get better. `before_step` is called on every rank with the number of each step,
    when all of the step before is recorded.
    """
    config, training, feed, evaluation = parts.config, parts.training, parts.feed, parts.evaluation
    tracker, saver = parts.tracker, parts.saver
    last, losses = config.train.steps, dict[str, float]()
    window = Window(config.train.profile, Path(config.run.dir) / "profile", int(os.environ.get("RANK", "0")))
    for step in range(done.step + 1, last + 1):
        if done.gives_up(config.eval.patience):
            break
        if preemption.is_due():
            if done.step > 0:  # also where it has just come from memory, which goes with the machine
                saver.leave(done, losses)
            window.close()
            return False
        if before_step is not None:
            before_step(step)
        with window.step(step):
            row = train_step(config, training, feed, step, done.loss_scale, saver.fence)
        check_finite(row)
        done.step, done.tokens = step, done.tokens + row["tokens"]
        row["tokens"] = done.tokens
        if due(step, config.eval.every, last):
            row |= evaluation.measure(training, feed)
            if "eval_loss" in row:
                done.evaluated(row["eval_loss"])
        # Write this step's line only after the previous snapshot is settled: a resume from that snapshot must find
        # every line up to it.
        tracker.step(row | saver.settle())
        losses = {key: row[key] for key in ("loss", "eval_loss") if math.isfinite(row.get(key, math.nan))}
        ends = step == last or done.gives_up(config.eval.patience)
        saver.save(done, losses, durable=ends or due(step, config.checkpoint.every, last), last=ends)
        every = config.eval.generate_every
        if not ends and every and step % every == 0 and (text := evaluation.write()):
            tracker.sample(step, *text)
    window.close()
    saver.finish(done, losses)
    return True


def train_step(
    config: Config,
    training: Training,
    feed: Feed,
    step: int,
    scale: LossScale | None = None,
    before_update: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One optimizer step on all ranks, and its line of metrics; `tokens` are this step's.

    A step that overflowed under a loss scale was left out, and has no norm.
    """
    began = time.perf_counter()
    lr = learning_rate(step, config.train.steps, config.optimizer.lr, config.schedule)
    share = feed.step(step)
    loss, grad_norm = optimize(training, share, lr, derive(config.train.seed, "step", step), scale, before_update)
    step_s = time.perf_counter() - began
    row: dict[str, Any] = {
        "step": step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": share.num_tokens,
        "samples": step * config.train.global_batch,
        "tokens_per_s": share.num_tokens / step_s,
        "step_s": step_s,
        "blocked_s": 0.0,
        "world_size": training.world_size,
        "memory_bytes": memory_used(training.device),
    }
    if scale is not None:
        row["loss_scale"] = scale.factor
        scale.update(math.isfinite(grad_norm))
        row["grad_norm"] = grad_norm if math.isfinite(grad_norm) else None
    if config.data.log_ids:
        row["sample_ids"] = consumed_ids(share)
    return row


def optimize(
    training: Training,
    share: StepShare,
    lr: float,
    key: int,
    scale: LossScale | None = None,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """One optimizer step: the mean loss over the global batch's targets, and the gradient's norm before clipping."""
    factor = None if scale is None else scale.factor
    micro_batches = [(derive(key, number), batch) for number, batch in share.micro_batches]
    loss_sum = training.accumulate(micro_batches, (factor or 1) / share.num_targets)
    norm = training.step(lr, factor, before_update)
    # Both leave the device together: the only wait for it in a step, but for the norm that fp16 decides by.
    loss, grad_norm = torch.cat([training.reduce(loss_sum) / share.num_targets, norm.double().reshape(1)]).tolist()
    return loss, grad_norm


def check_finite(row: dict[str, Any]) -> None:
    """All ranks see the same two numbers, so they stop together."""
    norm = row["grad_norm"]
    if norm is None and row["loss_scale"] > 1 and math.isfinite(row["loss"]):
        return  # the step was left out, and a smaller scale may do
    if norm is None or not (math.isfinite(row["loss"]) and math.isfinite(norm)):
        raise TrainingFailed(
            f"Step {row['step']} gave a loss of {row['loss']} and a gradient norm of {norm}, and its "
            "weights are of no use. What was saved before stays as it is. "
            + ("At the first step the base's own weights may be no numbers: look at them. " if row["step"] == 1 else "")
            + "Lower optimizer.lr, or look at this step's "
            + (f"samples: {row['sample_ids']}." if "sample_ids" in row else "samples: data.log_ids=true names them.")
        )


def consumed_ids(share: StepShare) -> list[int]:
    """The samples that the ranks really computed, gathered from them, in the order of the logical micro-batches.

    Ranks that share a model compute the same ones, which are named once.
    """
    mine = [(number, batch.ids.tolist()) for number, batch in share.micro_batches if len(batch.ids)]
    everyone = {number: ids for parts in Team().together(lambda: mine) for number, ids in parts}
    return [sample for number in sorted(everyone) for sample in everyone[number]]


def due(step: int, every: int, last: int) -> bool:
    """Every so many steps, and after the last; never but for the last where `every` is 0."""
    return step == last or (every > 0 and step % every == 0)
