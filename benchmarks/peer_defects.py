"""What the peers' checkpoints get wrong, each shown by running the installed peer and looking at what comes back.

    python -m benchmarks.peer_defects [--json] [--peer DCP|DeepSpeed] [--ranks N [N ...]]

A row says what was done and observed, and whether the defect showed: a peer that has mended it turns `shown` false.
The exit status is 1 only if a demonstration could not run. Needs Linux, no accelerator, and compiles nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.futures import Future

from benchmarks.report import machine, options_of
from tests.harness.ports import free_port

LIMIT_S = 240  # of one group of processes
SIDE = 2048  # of the matrix whose reads are counted: 16.8 MB, next to which the metadata is nothing
SAVED, FRESH = 0.5, 0.25  # what a model is built with before it is saved, and before it is loaded


@dataclass(frozen=True)
class Finding:
    """One row; `shown` is None where the demonstration could not run."""

    name: str
    peer: str
    observed: str
    shown: bool | None


Observation = tuple[str, bool]  # what was done and observed, and whether that is the defect


# DeepSpeed's universal checkpoint


def param_groups(directory: Path) -> Observation:
    saved, fresh, loaded = (facts["groups"] for facts in universal_round_trip(directory))
    assert saved == fresh, f"the fresh engine has other options than the saved one: {saved}, {fresh}"
    did = "saved under ZeRO-3 on 2 ranks, converted, loaded on 1 into an engine built with the same two groups"
    seen = f"(lr, weight decay, betas) saved as {' and '.join(saved)}, after the load {' and '.join(loaded)}"
    return f"{did}; {seen}", loaded != saved


def frozen_parameters(directory: Path) -> Observation:
    saved, fresh, loaded = (facts["values"] for facts in universal_round_trip(directory))
    assert loaded["trained.weight"] == saved["trained.weight"], "even what was trained is not restored"
    did = "saved under ZeRO-3 on 2 ranks, converted, loaded on 1 into a fresh model; what was trained is restored"
    others = {"frozen parameter": "frozen.weight", "buffer": "constant"}
    words = "{} saved as {:g}, after the load {:g} (fresh: {:g})"
    seen = [words.format(kind, saved[name], loaded[name], fresh[name]) for kind, name in others.items()]
    return "; ".join([did, *seen]), any(loaded[name] != saved[name] for name in others.values())


def universal_round_trip(directory: Path) -> tuple[Any, Any, Any]:
    """What was saved, what the fresh engine held, and what it held after the load."""
    saved = on_ranks(save_by_deepspeed, 2, directory)
    fresh, loaded = on_ranks(load_by_deepspeed, 1, directory)
    return saved, fresh, loaded


def save_by_deepspeed(directory: Path) -> Any:
    engine = deepspeed_engine(SAVED, universal=False)
    engine.backward(engine(torch.ones(1, 8)).square().mean())
    engine.step()
    engine.save_checkpoint(str(directory), tag="step")
    return facts_of(engine)


def load_by_deepspeed(directory: Path) -> Any:
    from deepspeed.checkpoint import ds_to_universal

    folders = {"input_folder": str(directory / "step"), "output_folder": str(directory / "universal")}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}  # in this process
    switches = {"keep_temp_folder": False, "strict": True, "inject_missing_state": False}
    ds_to_universal.main(Namespace(**folders, **workers, **switches))
    engine = deepspeed_engine(FRESH, universal=True)
    before = facts_of(engine)
    path, _ = engine.load_checkpoint(str(directory), tag="universal")
    assert path is not None, "DeepSpeed found nothing to load"
    return before, facts_of(engine)


def partly_frozen(value: float) -> torch.nn.Module:
    """One layer that is frozen, one that is trained, and a buffer, all filled with one value."""
    frozen, trained = torch.nn.Linear(8, 8, bias=False).requires_grad_(False), torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(OrderedDict(frozen=frozen, trained=trained))
    model.register_buffer("constant", torch.full((8,), value))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def deepspeed_engine(value: float, universal: bool) -> Any:
    import deepspeed

    # Its shared-memory collectives would be compiled at the first use; without them it falls back to gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = partly_frozen(value)
    groups = [
        {"params": [model.get_parameter("trained.weight")], "lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)},
        {"params": [model.get_parameter("trained.bias")], "lr": 0.001, "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "checkpoint": {"load_universal": universal},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return engine


def facts_of(engine: Any) -> dict[str, Any]:
    """The options of the param groups, and the first element of everything in the model."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        named = [*engine.module.named_parameters(), *engine.module.named_buffers()]
        values = {name: tensor.flatten()[0].item() for name, tensor in named}
    groups = [f"({g['lr']}, {g['weight_decay']}, {tuple(g['betas'])})" for g in engine.optimizer.param_groups]
    return {"groups": groups, "values": values}


# torch's distributed checkpoint (DCP)


def reads(directory: Path, sizes: Sequence[int]) -> Observation:
    factors = {size: on_ranks(bytes_read_over_needed, size, directory / str(size)) for size in sizes}
    did = f"saved a {SIDE} x {SIDE} matrix as Shard(0), loaded it as Shard(1)"
    seen = ", ".join(f"{factor:.2f} times the bytes needed on {size} ranks" for size, factor in factors.items())
    shown = all(factor > 0.75 * size for size, factor in factors.items())
    return f"{did}; its read calls returned {seen} (rchar of /proc/self/io)", shown


def bytes_read_over_needed(directory: Path) -> float:
    """All bytes that read calls gave to the ranks during a load (gloo receives by other calls), over their shards'."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    source = distribute_tensor(torch.rand(SIDE, SIDE), mesh, [Shard(0)])
    dcp_save({"x": source}, checkpoint_id=directory)
    target = distribute_tensor(torch.zeros(SIDE, SIDE), mesh, [Shard(1)])
    for _ in range(2):  # the first also reads modules that are imported late
        before = characters_read()
        dcp_load({"x": target}, checkpoint_id=directory)
        both = torch.tensor([characters_read() - before, target.to_local().nbytes])
    moved: DTensor = source.redistribute(placements=[Shard(1)])
    assert torch.equal(target.to_local(), moved.to_local()), "the load is wrong"
    dist.all_reduce(both)
    return float(both[0] / both[1])


def characters_read() -> int:
    return int(Path("/proc/self/io").read_text().splitlines()[0].removeprefix("rchar: "))


def metadata(directory: Path) -> Observation:
    checkpoint, marker = directory / "checkpoint", directory / "marker"
    dcp_save({"x": torch.ones(8)}, checkpoint_id=checkpoint, no_dist=True)
    # A wholly valid checkpoint, but for one attribute more in its metadata.
    crafted = FileSystemReader(checkpoint).read_metadata()
    vars(crafted)["remark"] = Trap(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(crafted))
    outcome = load_alone({"x": torch.zeros(8)}, checkpoint) or "the load succeeded"
    effect = "a call of its choice made a file" if marker.exists() else "nothing of it ran"
    return f"loaded a checkpoint whose .metadata is a crafted pickle; {effect}, {outcome}", marker.exists()


class Trap:
    """Becomes a call that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def flipped_bit(directory: Path) -> Observation:
    source, target = torch.ones(1024), torch.zeros(1024)
    dcp_save({"x": source}, checkpoint_id=directory, no_dist=True)
    (file,) = directory.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[content.index(source.numpy().tobytes()) + 2] ^= 0x80  # the lowest bit of the first element's exponent
    file.write_bytes(content)
    error = load_alone({"x": target}, directory)
    changed = int(target.ne(source).sum())
    seen = error or f"the load succeeded with {changed} element changed, from {source[0]:g} to {target[0]:g}"
    return f"flipped one bit in a data file; {seen}", error is None and changed > 0


def torn_overwrite(directory: Path) -> Observation:
    try:
        return f"saved step 1, then step 2 in its place; {on_ranks(save_twice, 2, directory)}", False
    except RankDied as death:
        if death.statuses[1] != -signal.SIGKILL:
            raise
    target = torch.zeros(8, 8)
    error = load_alone({"x": target}, directory)
    steps = sorted(set(target.flatten().tolist()))
    seen = error or "the load succeeded, with values of step " + " and of step ".join(f"{step:g}" for step in steps)
    did = "saved step 1 on 2 ranks, overwrote it with step 2 until rank 1 was killed, rank 0 having written its file"
    return f"{did}; {seen}", error is None and steps == [1, 2]


def save_twice(directory: Path) -> str:
    """Does not return, unless the overwrite is refused."""
    mesh = init_device_mesh("cpu", (2,))
    first, second = (distribute_tensor(torch.full((8, 8), step), mesh, [Shard(0)]) for step in (1.0, 2.0))
    dcp_save({"x": first}, storage_writer=FileSystemWriter(directory))
    try:
        dcp_save({"x": second}, storage_writer=DyingWriter(directory))
    except (Exception, CheckpointException) as error:
        return f"the second save raised {type(error).__name__}"
    raise AssertionError("the second save ended, though rank 1 was to die")


class DyingWriter(FileSystemWriter):
    """Rank 1 is killed when rank 0 has written its file and rank 1 has not."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if dist.get_rank() == 1:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        written = super().write_data(plan, planner)
        written.wait()
        dist.barrier()
        return written


def load_alone(state: dict[str, Any], directory: Path) -> str | None:
    """Load in place, in this process; returns how the load was refused, if it was."""
    try:
        dcp_load(state, checkpoint_id=directory, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        return f"the load raised {type(error).__name__}"
    return None


# Groups of processes


class RankDied(Exception):
    """`statuses` are those at the moment the first rank failed: None for a rank that was still running."""

    def __init__(self, statuses: Sequence[int | None], log: str) -> None:
        super().__init__(f"ranks ended with statuses {list(statuses)}\nThe end of their output:\n{log}")
        self.statuses = statuses


def on_ranks(work: Callable[..., Any], size: int, *arguments: Any) -> Any:
    """What `work(*arguments)` returns on rank 0 of a gloo group; if one rank dies or the time is up, all are killed."""
    new, port = multiprocessing.get_context("spawn").Process, free_port()
    with tempfile.TemporaryDirectory() as notes:
        common = (size, port, notes, work, arguments)
        ranks = [new(target=one_rank, args=(rank, *common), daemon=True) for rank in range(size)]
        try:
            for process in ranks:
                process.start()
            statuses = wait_for(ranks)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                    process.join()
        if any(statuses):
            raise RankDied(statuses, "".join(log.read_text()[-2000:] for log in sorted(Path(notes).glob("*.log"))))
        return json.loads(Path(notes, "found.json").read_text())


def wait_for(ranks: Sequence[BaseProcess]) -> list[int | None]:
    """Until all are done or one has failed."""
    deadline = time.monotonic() + LIMIT_S
    while (running := [p for p in ranks if p.exitcode is None]) and not any(p.exitcode for p in ranks):
        if not wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"{len(running)} of {len(ranks)} ranks were still running after {LIMIT_S} s")
    return [process.exitcode for process in ranks]


def one_rank(rank: int, size: int, port: int, notes: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    signal.alarm(LIMIT_S)  # ends it even where nobody is left to kill it
    with open(Path(notes, f"{rank}.log"), "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", TMPDIR=notes)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_S))
    found = work(*arguments)
    if rank == 0:
        Path(notes, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def demonstrate(name: str, peer: str, demonstration: Callable[[Path], Observation]) -> Finding:
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of DCP, that there is but one process, or that it overwrites
        try:
            return Finding(name, peer, *demonstration(Path(directory)))
        except Exception as error:
            traceback.print_exc()
            cause = str(error).partition("\n")[0]
            return Finding(name, peer, f"could not run: {type(error).__name__}: {cause}", None)


QUICK = {"peer": "DCP", "ranks": [2]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_defects", description=__doc__)
    parser.add_argument("--peer", choices=("DCP", "DeepSpeed"), help="only the defects of this one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="that read (default 2 4)")
    arguments = options_of(parser, QUICK)
    if min(arguments.ranks) < 2:
        parser.error("--ranks: on one rank there is no other layout; give 2 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what ends the ranks and removes the files
    demonstrations: list[tuple[str, str, Callable[[Path], Observation]]] = [
        ("param groups overwritten", "DeepSpeed", param_groups),
        ("frozen parameters not restored", "DeepSpeed", frozen_parameters),
        ("W-fold reads", "DCP", partial(reads, sizes=arguments.ranks)),
        ("metadata that executes", "DCP", metadata),
        ("a flipped bit that loads", "DCP", flipped_bit),
        ("a torn overwrite that mixes steps", "DCP", torn_overwrite),
    ]
    rows = [demonstrate(*row) for row in demonstrations if arguments.peer in (None, row[1])]
    place = f"{machine()}, DeepSpeed {importlib.metadata.version('deepspeed')}"
    if arguments.json:
        print(json.dumps({"benchmark": "peer_defects", "machine": place, "rows": [asdict(row) for row in rows]}))
    else:
        print(f"peer_defects on {place}")
        for row in rows:
            verdict = {True: "SHOWN", False: "NOT SHOWN", None: "NOT RUN"}[row.shown]
            print(f"  {row.name} ({row.peer}): {row.observed}: {verdict}")
    return int(any(row.shown is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
