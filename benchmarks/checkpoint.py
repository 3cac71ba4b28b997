"""Saving and loading sharded Adam state, against torch's distributed checkpoint (DCP), DeepSpeed and raw files.

    python -m benchmarks.checkpoint [--json] [--parts NAME ...] [--megabytes N] [--rounds N] [--ranks N [N ...]]

The parts are `layouts`, which is here, and `universal`, `planning`, `reads`, `resident` and `scale`, each a module
beside this one, which says what it does. Of the layouts:

Both sides hold the same DTensors, save and load them in turn on the same processes, fsync what they write, and are
asserted to end with every bit in its place. Processes are started before anything is timed; a round's time is that of
its slowest rank. Loads are from the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks import planning, reads, resident, scale, universal
from benchmarks.report import Row, compared, cores, finish, options_of
from checkpointing import Piece, load, pieces_of, save
from checkpointing.tensors import tensor_bytes
from tests.harness.worlds import on_ranks

SIDE = 2048  # of the square matrices: 16.8 MB each in fp32
FULL_MEGABYTES = 1300
WAIT_S = 900.0
Series = dict[str, list[float]]


class State:
    """Parameters and both moments of Adam as DTensors of one layout, and the same as pieces."""

    def __init__(self, megabytes: int, placement: Shard, fill: bool) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        count = max(1, round(megabytes * 1e6 / (3 * SIDE * SIDE * 4)))
        self.tensors: dict[str, DTensor] = {}
        for number in range(count):
            for kind in ("model/{}", "optim/{}/exp_avg", "optim/{}/exp_avg_sq"):
                name = kind.format(f"layers.{number}.weight")
                self.tensors[name] = self._tensor(mesh, placement, len(self.tensors) if fill else None)

    @staticmethod
    def _tensor(mesh: Any, placement: Shard, seed: int | None) -> DTensor:
        if seed is None:
            return distribute_tensor(torch.zeros(SIDE, SIDE), mesh, [placement])
        whole = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        return DTensor.from_local(whole, mesh, [Replicate()]).redistribute(placements=[placement])

    @property
    def pieces(self) -> list[Piece]:
        return [piece for name, tensor in self.tensors.items() for piece in pieces_of(name, tensor)]

    @property
    def local_bytes(self) -> int:
        return sum(tensor.to_local().nbytes for tensor in self.tensors.values())

    def assert_equals(self, other: State) -> None:
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor.to_local(), other.tensors[name].to_local()), name

    def clear(self) -> None:
        for tensor in self.tensors.values():
            tensor.to_local().zero_()


def save_ours(state: State, directory: Path) -> None:
    save(directory, 1, state.pieces)


def save_dcp(state: State, directory: Path) -> None:
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    dcp_save(dict(state.tensors), storage_writer=writer, planner=DefaultSavePlanner(enable_plan_caching=True))


def save_raw(state: State, directory: Path) -> None:
    """The same bytes in as many files, written and synced by each rank: what the disk can do."""
    directory.mkdir(exist_ok=True)
    with open(directory / str(dist.get_rank()), "wb", buffering=0) as file:
        for tensor in state.tensors.values():
            file.write(tensor_bytes(tensor.to_local()))
        os.fsync(file.fileno())


def load_ours(state: State, directory: Path) -> None:
    load(directory, state.pieces)


def load_dcp(state: State, directory: Path) -> None:
    dcp_load(dict(state.tensors), storage_reader=FileSystemReader(directory))


def timed(action: Callable[[], None]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    action()
    seconds = torch.tensor([time.perf_counter() - began])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def remove(directory: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        os.sync()  # what was deleted is not written back within the next measurement
    dist.barrier()


def measure_saves(state: State, top: Path, rounds: int) -> Series:
    sides: dict[str, Callable[[State, Path], None]] = {"ours": save_ours, "dcp": save_dcp, "raw": save_raw}
    seconds: Series = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first warms up
        for name in rotated(list(sides), number):
            remove(top / name)
            took = timed(lambda name=name: sides[name](state, top / name))  # type: ignore[misc]
            if number:
                seconds[name].append(took)
    return seconds


def measure_loads(source: State, target: State, top: Path, rounds: int) -> Series:
    """Load what `measure_saves` left, in turn; every load is checked in full."""
    sides: dict[str, Callable[[State, Path], None]] = {"ours": load_ours, "dcp": load_dcp}
    seconds: Series = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in rotated(list(sides), number):
            target.clear()
            took = timed(lambda name=name: sides[name](target, top / name))  # type: ignore[misc]
            target.assert_equals(source)
            if number:
                seconds[name].append(took)
    return seconds


def rotated(names: list[str], by: int) -> list[str]:
    """Rotate the names by the round, alike on all ranks."""
    return names[by % len(names) :] + names[: by % len(names)]


def work(directory: str, megabytes: int, rounds: int) -> dict[str, Any]:
    """All measurements on one number of ranks: the seconds."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(max(1, cores() // dist.get_world_size()))
    top = Path(directory)
    source, reference = State(megabytes, Shard(0), True), State(megabytes, Shard(1), True)
    found: dict[str, Any] = {"save": measure_saves(source, top, rounds)}
    found["same"] = measure_loads(source, State(megabytes, Shard(0), False), top, rounds)
    target = State(megabytes, Shard(1), False)
    found["across"] = measure_loads(reference, target, top, rounds)
    return found


def run(size: int, megabytes: int, rounds: int) -> list[Row]:
    full = megabytes >= FULL_MEGABYTES and rounds >= 5
    with tempfile.TemporaryDirectory() as directory:
        found = on_ranks(work, size, directory, megabytes, rounds, wait_s=WAIT_S)[0]
    what = f"{megabytes / 1000:g} GB on {size} ranks"
    saves, same, across = found["save"], found["same"], found["across"]
    return [
        compared(f"durable save, {what}", "s", saves["ours"], saves["dcp"], "DCP", bar=1.0, full=full and size == 2),
        compared(
            f"durable save, {what}",
            "s",
            saves["ours"],
            saves["raw"],
            "raw files",
            bar=1 / 0.85,
            full=full and size == 2,
        ),
        compared(f"load, same layout, {what}", "s", same["ours"], same["dcp"], "DCP", bar=0.8, full=full and size == 2),
        compared(
            f"load, Shard(0) to Shard(1), {what}",
            "s",
            across["ours"],
            across["dcp"],
            "DCP",
            bar=0.5,
            full=full and size == 8,
        ),
    ]


QUICK = {"megabytes": 40, "rounds": 2, "ranks": [2], "parts": ["layouts", "reads", "resident"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=FULL_MEGABYTES, help=f"of state (default {FULL_MEGABYTES})")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement, after one to warm up (default 5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="numbers of processes (default 2 8)")
    parts: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
        "layouts": lambda a: [row for size in a.ranks for row in run(size, a.megabytes, a.rounds)],
        "universal": lambda a: universal.run(a.megabytes, a.rounds),
        "planning": lambda a: planning.run(planning.RANKS, planning.TENSORS, min(a.rounds, 3)),
        "reads": lambda _: reads.run(reads.LARGEST),
        "resident": lambda a: resident.run(a.megabytes),
        "scale": lambda _: scale.run(scale.WRITERS, scale.GENERATIONS),
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="which (default all)")
    arguments = options_of(parser, QUICK)
    if arguments.rounds < 2 or arguments.megabytes < 1:
        parser.error("quartiles need --rounds 2 at least, and a state --megabytes 1")
    rows = [row for name in arguments.parts for row in parts[name](arguments)]
    return finish("checkpoint", rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
