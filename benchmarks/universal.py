"""Saved on two ranks, going on with one: ours against DeepSpeed's universal checkpoints.

    python -m benchmarks.universal [--json] [--megabytes N] [--rounds N]

Two ranks have taken a step, their state sharded (FSDP2 on our side, ZeRO-2 on DeepSpeed's). Timed is everything until
one rank that holds the whole state has taken the next: save; DeepSpeed's conversion; a new engine; load; the step. The
same model, batches, AdamW and threads on both sides. All processes run before anything is timed and have imported what
they need; a second row adds what importing costs a user, who starts the new engine, and the conversion, as a process.
Every round's loss and parameters are asserted equal to those of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import gelu, mse_loss
from torch.optim import AdamW

from benchmarks.report import Row, compared, cores, finish, options_of
from checkpointing import describe, load, save
from tests.harness.ports import free_port
from tests.harness.processes import leave

BAR = 1 / 8
FULL_MEGABYTES = 1300
SOURCES, CONVERTER, TARGET = 2, 2, 3  # processes 0 and 1 train and save, 2 converts, 3 loads and goes on
WORKERS = 2  # of the conversion: one for every rank's file; measured faster than one by a third on two cores
WIDTH = 2048
BATCH = 16
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "fused": True}
TOLERANCE = 1e-6  # of the largest parameter
WAIT_S = 300.0
PEER = "DeepSpeed universal"
Series = dict[str, list[float]]
Ports = tuple[int, int]  # of the two process groups
Taken = tuple[float, nn.Module]  # a step: its loss, and the model after it


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + gelu(self.linear(x)) / 8  # so that activations stay small through many of them


def build(megabytes: int, *, fill: bool) -> nn.Sequential:
    """Residual blocks whose parameters and both moments take `megabytes`; zeros where a load is to fill them."""
    count = max(1, round(megabytes * 1e6 / (3 * 4 * WIDTH * (WIDTH + 1))))
    if fill:
        torch.manual_seed(0)
        return nn.Sequential(*(Block() for _ in range(count)))
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(count)))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.detach().zero_()
    return model


def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's rows of a step's inputs and targets."""
    both = torch.randn(2, BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    inputs, targets = both.chunk(parts, dim=1)[part]
    return inputs, targets


def torch_step(model: nn.Module, optimizer: AdamW, step: int, part: int, parts: int) -> Taken:
    inputs, targets = batch(step, part, parts)
    loss = mse_loss(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), model


class Ours:
    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes

    def start(self) -> None:
        """The first step, on two ranks."""
        self.model = build(self.megabytes, fill=True)
        for block in self.model:
            fully_shard(block)
        fully_shard(self.model)
        self.optimizer = AdamW(self.model.parameters(), **ADAMW)  # type: ignore[arg-type]
        torch_step(self.model, self.optimizer, 1, dist.get_rank(), SOURCES)

    def save(self, directory: Path) -> None:
        save(directory, 1, describe(self.model, self.optimizer))

    def convert(self, directory: Path) -> None:
        """Nothing: what one layout saves, any other loads."""

    def go_on(self, directory: Path) -> Taken:
        model = build(self.megabytes, fill=False)
        optimizer = AdamW(model.parameters(), **ADAMW)  # type: ignore[arg-type]
        load(directory, describe(model, optimizer))
        return torch_step(model, optimizer, 2, 0, 1)

    def drop(self) -> None:
        """Nothing is kept."""


class DeepSpeed:
    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes

    @staticmethod
    def _engine(model: nn.Module, micro_batch: int, universal: bool) -> Any:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, **ADAMW}},
            "gradient_clipping": 0.0,  # its default is 1
            "zero_optimization": {"stage": 2},
            "checkpoint": {"load_universal": universal},
            "steps_per_print": sys.maxsize,
        }
        return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]

    @staticmethod
    def _step(engine: Any, step: int, part: int, parts: int) -> Taken:
        inputs, targets = batch(step, part, parts)
        loss = mse_loss(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        return loss.item(), engine.module

    def start(self) -> None:
        self.engine = self._engine(build(self.megabytes, fill=True), BATCH // SOURCES, universal=False)
        self._step(self.engine, 1, dist.get_rank(), SOURCES)

    def save(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag="step")

    def convert(self, directory: Path) -> None:
        from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

        ds_to_universal(
            argparse.Namespace(
                input_folder=str(directory / "step"),
                output_folder=str(directory / "universal"),
                num_extract_workers=WORKERS,
                num_merge_workers=WORKERS,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # of checkpoints that Megatron did not write
            )
        )

    def go_on(self, directory: Path) -> Taken:
        self.engine = self._engine(build(self.megabytes, fill=False), BATCH, universal=True)
        self.engine.load_checkpoint(str(directory), tag="universal")
        return self._step(self.engine, 2, 0, 1)

    def drop(self) -> None:
        """An engine's hooks would keep it alive."""
        self.engine.destroy()
        del self.engine


def uninterrupted(megabytes: int) -> Taken:
    """Both steps in one process; the first step's gradients are the mean over two halves, as with two ranks."""
    model = build(megabytes, fill=True)
    optimizer = AdamW(model.parameters(), **ADAMW)  # type: ignore[arg-type]
    for part in range(SOURCES):
        inputs, targets = batch(1, part, SOURCES)
        (mse_loss(model(inputs), targets) / SOURCES).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return torch_step(model, optimizer, 2, 0, 1)


def assert_equal(taken: Taken, reference: Taken, who: str) -> None:
    (loss, model), (expected_loss, expected) = taken, reference
    assert abs(loss - expected_loss) <= TOLERANCE * abs(expected_loss), (who, loss, expected_loss)
    found = dict(model.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys(), who
    for name, parameter in expected.named_parameters():
        difference = float((found[name].detach() - parameter.detach()).abs().max())
        assert difference <= TOLERANCE * float(parameter.detach().abs().max()), (who, name, difference)


def prepare(rank: int, ports: Ports) -> None:
    """Imports, threads and the process group of one process; DeepSpeed's talk is not ours to print."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.filterwarnings("ignore")
    import deepspeed
    import deepspeed.checkpoint.ds_to_universal
    import deepspeed.ops

    deepspeed.utils.logger.setLevel("ERROR")
    # An operation that it would compile at the first use, for over a minute, to do without gloo on one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if rank == CONVERTER:
        torch.set_num_threads(1)  # in each of its workers
        # Its workers are forks, as in its own command; a spawned process's would all import torch anew.
        multiprocessing.set_start_method("fork", force=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no workers behind
        return
    size, at = (SOURCES, rank) if rank < SOURCES else (1, 0)
    torch.set_num_threads(max(1, cores() // size))
    os.environ.update(RANK=str(at), LOCAL_RANK=str(at), WORLD_SIZE=str(size), LOCAL_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[rank >= SOURCES]))
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=WAIT_S), verbose=False)


def one_round(rank: int, side: Ours | DeepSpeed, directory: Path, barrier: Barrier) -> tuple[list[float], Taken | None]:
    """Seconds of saving, of converting, and of a new engine, loading and its step; what the target has in the end."""
    if rank == TARGET:
        shutil.rmtree(directory, ignore_errors=True)
        os.sync()  # what was deleted is not written back within this round
    gc.collect()
    barrier.wait(WAIT_S)
    times, taken = [time.perf_counter()], None
    if rank < SOURCES:
        side.save(directory)
    barrier.wait(WAIT_S)
    times.append(time.perf_counter())
    if rank == CONVERTER:
        side.convert(directory)
    barrier.wait(WAIT_S)
    times.append(time.perf_counter())
    if rank == TARGET:
        taken = side.go_on(directory)
    times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)], taken


def work(rank: int, ports: Ports, barrier: Barrier, directory: str, megabytes: int, rounds: int) -> None:
    """One of four processes; the target leaves the seconds of every round in a file."""
    prepare(rank, ports)
    sides: dict[str, Ours | DeepSpeed] = {"ours": Ours(megabytes), "peer": DeepSpeed(megabytes)}
    if rank < SOURCES:
        for side in sides.values():
            side.start()
    reference = uninterrupted(megabytes) if rank == TARGET else None
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first warms up
        for name in sorted(sides, reverse=bool(number % 2)):
            took, taken = one_round(rank, sides[name], Path(directory, name), barrier)
            if taken and reference:
                assert_equal(taken, reference, name)
                del taken
                sides[name].drop()
            if number:
                seconds[name].append(took)
    if rank == TARGET:
        Path(directory, "seconds.json").write_text(json.dumps(seconds))
    barrier.wait(WAIT_S)
    leave()


def import_seconds(module: str) -> float:
    """Seconds of a process that starts, imports a module and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True, timeout=WAIT_S)
    return time.perf_counter() - began


def remove_shared_memory(ports: Ports) -> None:
    """What DeepSpeed leaves of its process groups."""
    for port in ports:
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_*"):
            left.unlink(missing_ok=True)


def run(megabytes: int, rounds: int) -> list[Row]:
    full = megabytes >= FULL_MEGABYTES and rounds >= 5
    os.environ.update(DS_ACCELERATOR="cpu", TQDM_DISABLE="1")  # of the processes that are started here
    ports = (free_port(), free_port())
    barrier = multiprocessing.get_context("spawn").Barrier(TARGET + 1)
    with tempfile.TemporaryDirectory() as directory:
        try:
            spawn(work, args=(ports, barrier, directory, megabytes, rounds), nprocs=TARGET + 1)  # type: ignore[no-untyped-call]
        finally:
            remove_shared_memory(ports)
        seconds = json.loads(Path(directory, "seconds.json").read_text())
    whole = {name: [sum(took) for took in series] for name, series in seconds.items()}
    return rows(whole, seconds, f"{megabytes / 1000:g} GB, 2 ranks to 1", full)


def rows(whole: Series, parts: dict[str, list[list[float]]], what: str, full: bool) -> list[Row]:
    """The judged row, the same with imports where it is judged, and the three parts."""
    judged = compared(
        f"saved, layout changed, next step taken, {what}", "s", whole["ours"], whole["peer"], PEER, bar=BAR, full=full
    )
    others = {}
    if full:
        # Both start a process for the new engine; DeepSpeed's users start one more, for the conversion.
        starts = {"ours": import_seconds("checkpointing"), "peer": 2 * import_seconds("deepspeed")}
        others["the same with starts and imports"] = {side: [t + starts[side] for t in whole[side]] for side in whole}
    for index, part in enumerate(("of it saving", "of it converting", "of it new engine, loading, step")):
        others[part] = {side: [took[index] for took in parts[side]] for side in parts}
    return [
        judged,
        *(
            replace(compared(f"{name}, {what}", "s", found["ours"], found["peer"], PEER, bar=0, full=False), bar=None)
            for name, found in others.items()
        ),
    ]


QUICK = {"megabytes": 40, "rounds": 2}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.universal", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=FULL_MEGABYTES, help=f"of state (default {FULL_MEGABYTES})")
    parser.add_argument("--rounds", type=int, default=5, help="of each side, after one to warm up (default 5)")
    arguments = options_of(parser, QUICK)
    if arguments.rounds < 2 or arguments.megabytes < 1:
        parser.error("quartiles need --rounds 2 at least, and a state --megabytes 1")
    return finish("universal", run(arguments.megabytes, arguments.rounds), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
