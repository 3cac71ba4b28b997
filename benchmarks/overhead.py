"""Our training step, with default logging, against a loop of plain torch written by hand.

    python -m benchmarks.overhead [--json] [--steps N]

The same model, samples, micro-batches, threads and optimizer on both sides, in the same process, one step of each in
turn; the losses of all steps are asserted equal. Once on one process and once with DDP on two.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.report import Row, compared, cores, finish, options_of
from tests.harness.engines import feed_for, place, training_here
from tests.harness.worlds import on_ranks
from trainer.compose import compose
from trainer.data.dataset import Windows
from trainer.data.order import samples_of_step
from trainer.data.sources import load_corpus
from trainer.loop import check_finite, train_step
from trainer.methods import build
from trainer.models import load_tokenizer
from trainer.options.config import Config
from trainer.parallel.world import World
from trainer.track.tracker import RunTracker

BAR = 1.03
WAIT_S = 900.0
WARMUP = 10


class HandWritten:
    """What one would write without us, for this model and this data."""

    def __init__(self, config: Config, tokens: torch.Tensor, order: list[list[int]], rank: int, size: int) -> None:
        self.config, self.tokens, self.order, self.rank, self.size = config, tokens, order, rank, size
        self.bare = build(config)
        self.model = DistributedDataParallel(self.bare, gradient_as_bucket_view=True) if size > 1 else self.bare
        decayed = [p for p in self.bare.parameters() if p.dim() >= 2]
        plain = [p for p in self.bare.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=True,
        )

    def step(self, number: int) -> float:
        length = self.config.train.seq_len
        mine = self.order[number - 1]
        micro_batches = [mine[i : i + 2] for i in range(0, len(mine), 2)][self.rank :: self.size]
        total = torch.zeros(())
        for turn, ids in enumerate(micro_batches):
            rows = torch.stack([self.tokens[i * length : i * length + length + 1] for i in ids])
            last = turn == len(micro_batches) - 1
            with contextlib.nullcontext() if last or self.size == 1 else self.model.no_sync():  # type: ignore[operator]
                logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
                loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
                (loss * self.size / (len(mine) * length)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.bare.parameters(), 1.0)
        rate = number / 50 if number <= 50 else 0.1 + 0.45 * (1 - cos(pi * (800 - number) / 750))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.size > 1:
            dist.all_reduce(total)
        return float(total.item()) / (len(mine) * length)


class Ours:
    """The trainer's own step: what `python -m trainer` runs between two checkpoints, with its default logging."""

    def __init__(self, config: Config, corpus: Windows, world: World) -> None:
        self.config = config
        self.engine = training_here(config)
        self.feed = feed_for(self.engine, config, corpus, seed=config.train.seed)
        self.tracker = RunTracker(config, "overhead", world.rank)

    def step(self, number: int) -> float:
        row = train_step(self.config, self.engine, self.feed, number)
        check_finite(row)
        self.tracker.step(row)
        return float(row["loss"])


def measure(steps: int, directory: str, threads: int) -> dict[str, list[float]]:
    """The seconds of every step of both, in turn."""
    torch.set_num_threads(threads)
    config = compose([f"run.dir={directory}/run"])
    Path(config.run.dir).mkdir(exist_ok=True)
    corpus = load_corpus(config.data, load_tokenizer(config.model), config.train.seq_len).train
    assert isinstance(corpus, Windows)
    world = place()
    rank, size = world.rank, world.size
    with contextlib.redirect_stdout(io.StringIO()):
        ours = Ours(config, corpus, world)
        order = [
            samples_of_step(s, seed=config.train.seed, dataset_size=len(corpus), global_batch=config.train.global_batch)
            for s in range(1, WARMUP + steps + 1)
        ]
        tokens = torch.from_numpy(corpus.tokens.astype(np.int64))
        peer = HandWritten(config, tokens, [ids.tolist() for ids in order], rank, size)
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for number in range(1, WARMUP + steps + 1):
            losses: dict[str, float] = {}
            sides: list[tuple[str, Any]] = [("ours", ours), ("peer", peer)]
            for name, side in sides if number % 2 else reversed(sides):
                if size > 1:
                    dist.barrier()
                began = time.perf_counter()
                losses[name] = side.step(number)
                if number > WARMUP:
                    seconds[name].append(time.perf_counter() - began)
            assert abs(losses["ours"] - losses["peer"]) < 1e-5, f"step {number}: {losses}"
        ours.tracker.close(0)
    return seconds


def run(size: int, steps: int, full: bool) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        threads = max(1, cores() // size)
        seconds = on_ranks(measure, size, steps, directory, threads, wait_s=WAIT_S, environment=size == 1)[0]
    name = f"training step, {size} process{'es (DDP)' if size > 1 else ''}, {threads} threads each"
    return compared(name, "s", seconds["ours"], seconds["peer"], "hand-written loop", bar=BAR, full=full)


QUICK = {"steps": 5}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="timed steps of each side (default 150)")
    arguments = options_of(parser, QUICK)
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: quartiles need at least 2")
    os.environ.setdefault("WANDB_MODE", "offline")
    rows = [run(size, arguments.steps, full=arguments.steps >= 150) for size in (1, 2)]
    return finish("overhead", rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
