"""How long a save and a load of many small tensors are planned, by us and by torch's distributed checkpoint (DCP).

    python -m benchmarks.planning [--json] [--ranks N] [--tensors N] [--rounds N]

DCP's own `save` and `load` run, with their collectives, on a storage that moves no data; a rank has planned when it is
handed the plan it is to carry out. On both sides what describes the checkpoint is in memory, so that reading it is not
counted, and neither is writing it; and so are the pieces and the DTensors.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from benchmarks.report import Row, absolute, compared, cores, finish, options_of
from checkpointing import pieces_of, planner
from checkpointing import save as save_ours
from checkpointing.collective import Team
from checkpointing.generations import read_manifest
from checkpointing.plan import layout_rows
from checkpointing.planner import agree_on_completeness, agree_on_plan
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage
from tests.harness.worlds import on_ranks

TENSORS = 5000
RANKS = 8
SHAPE = (64, 32)
WAIT_S = 300.0  # of a collective
Series = dict[str, list[float]]


class CachingPlanner(DefaultSavePlanner):
    """A class of its own, because DCP caches plans by the class's name and other saves may have left theirs."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=True)


class NoWriter(StorageWriter):
    """Takes the plan and the metadata, and writes nothing."""

    planned_at: float
    metadata: Metadata

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.planned_at = time.perf_counter()
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class NoReader(StorageReader):
    """Has the metadata in memory, takes the plan, and reads nothing."""

    planned_at: float

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self.planned_at = time.perf_counter()
        read: Future[None] = Future()
        read.set_result(None)
        return read

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def planned_save(tensors: dict[str, DTensor], planner: DefaultSavePlanner) -> tuple[float, Metadata]:
    """Seconds until the slowest rank has its plan, and the metadata, which `save` hands to all ranks."""
    writer = NoWriter()
    dist.barrier()
    began = time.perf_counter()
    metadata = save(dict(tensors), storage_writer=writer, planner=planner)
    return slowest(writer.planned_at - began), metadata


def planned_load(tensors: dict[str, DTensor], metadata: Metadata) -> float:
    """Seconds until the slowest rank has its plan."""
    reader = NoReader(metadata)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dist.barrier()
    began = time.perf_counter()
    load(dict(tensors), storage_reader=reader, planner=planner)
    return slowest(reader.planned_at - began)


def slowest(seconds: float) -> float:
    found = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def sharded_tensors(count: int) -> dict[str, DTensor]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    shape = (SHAPE[0] // size, SHAPE[1])
    return {f"model/{number}": DTensor.from_local(torch.zeros(shape), mesh, [Shard(0)]) for number in range(count)}


def measure_dcp_planning(count: int = TENSORS, rounds: int = 1) -> Series:
    """Seconds of the slowest rank in every round; collective.

    A cold save caches no plans, which costs a little less than the first save with a cache. DCP caches none for loads,
    so that a load again differs from the first by chance alone.
    """
    tensors = sharded_tensors(count)
    planned_save(sharded_tensors(1), DefaultSavePlanner())  # what is made at the first use of anything
    planned_save(tensors, CachingPlanner())  # fills the cache
    seconds: Series = {name: [] for name in ("save, cold", "save, cached", "load, cold", "load, again")}
    for _ in range(rounds):
        plain = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        gc.collect()
        cold, metadata = planned_save(tensors, plain)
        seconds["save, cold"].append(cold)
        gc.collect()
        seconds["save, cached"].append(planned_save(tensors, CachingPlanner())[0])
        for name in ("load, cold", "load, again"):
            gc.collect()
            seconds[name].append(planned_load(tensors, metadata))
    return seconds


def measure_our_planning(directory: str, count: int = TENSORS, rounds: int = 1) -> Series:
    """Seconds of the slowest rank in every round, for new layouts and for the same again; collective."""
    tensors = sharded_tensors(count)
    team = Team()
    pieces = [piece for name, tensor in tensors.items() for piece in pieces_of(name, tensor)]
    storage = FileStorage(directory)
    manifest = read_manifest(storage, save_ours(storage, 1, pieces))
    reader = GenerationReader(storage, manifest)
    assert len(reader.indexes) == team.size  # read before anything is timed
    seconds: Series = {name: [] for name in ("save, cold", "save, cached", "load, cold", "load, again")}

    def timed(name: str, action: Callable[[], object]) -> None:
        dist.barrier()
        began = time.perf_counter()
        action()
        seconds[name].append(slowest(time.perf_counter() - began))

    def load_planned() -> None:
        """Plan a load as every load does, with a reader of its own whose indexes are there already."""
        agree_on_completeness(team, layout_rows(pieces), manifest)
        assert len(reader.plan(pieces)) == count

    def save_planned() -> None:
        agree_on_plan(team, layout_rows(pieces))

    for _ in range(rounds):
        planner.forget()
        gc.collect()  # what a new plan replaces, and the benchmark's own; not while something is timed
        for name, action in (("save", save_planned), ("load", load_planned)):
            timed(f"{name}, cold", action)
            gc.collect()
            timed(f"{name}, {'cached' if name == 'save' else 'again'}", action)
    return seconds


def work(directory: str, count: int, rounds: int) -> list[dict[str, list[float]]]:
    """The seconds of both sides."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(max(1, cores() // dist.get_world_size()))
    ours = measure_our_planning(f"{directory}/ours", count, rounds)
    dcp = measure_dcp_planning(count, rounds)
    return [ours, dcp]


BARS = {"save, cold": 1.5, "save, cached": 0.05, "load, cold": 1.5, "load, again": 0.05}


def run(size: int, count: int, rounds: int) -> list[Row]:
    """The bars are of our own figures, at full size; beside them the comparison."""
    with tempfile.TemporaryDirectory() as directory:
        ours, dcp = on_ranks(work, size, directory, count, rounds, wait_s=WAIT_S)[0]
    full = size == RANKS and count == TENSORS
    rows = []
    for name, bar in BARS.items():
        what = f"planning {count:,} small tensors, {size} ranks, {name}"
        rows.append(absolute(what, "s", statistics.median(ours[name]), better="lower", bar=bar, full=full))
        rows.append(compared(f"{what}, against DCP", "s", ours[name], dcp[name], "DCP", bar=1.0, full=full))
    return rows


QUICK = {"ranks": 4, "tensors": 500}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--ranks", type=int, default=RANKS, help=f"processes: 1, 2, 4 ... 64 (default {RANKS})")
    parser.add_argument("--tensors", type=int, default=TENSORS, help=f"of {SHAPE} in fp32 (default {TENSORS})")
    parser.add_argument("--rounds", type=int, default=2, help="of each measurement (default 2)")
    arguments = options_of(parser, QUICK)
    if arguments.ranks < 1 or SHAPE[0] % arguments.ranks:
        parser.error(f"--ranks {arguments.ranks}: must divide the {SHAPE[0]} rows of a tensor")
    if arguments.tensors < 1 or arguments.rounds < 2:
        parser.error("a tensor at least, and quartiles need --rounds 2")
    return finish("planning", run(arguments.ranks, arguments.tensors, arguments.rounds), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
