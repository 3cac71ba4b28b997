"""Snapshots in CPU memory, against torch's `async_save` with its cached stager, memory copies and raw files.

    python -m benchmarks.memory [--json] [--megabytes N] [--pairs N] [--device cuda --ranks N --tokens N]

Two ranks (of CPUs) train the same FSDP2 model with Adam. A step without a snapshot, one with ours and one with DCP's
take turns; what each side does in the background is over before the next begins, and what it holds at the end is
asserted to be the state.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.report import Row, compared, finish, options_of
from checkpointing import Piece, describe, load
from checkpointing.memory import Snapshotter
from checkpointing.memory.mapped import MappedStorage
from tests.harness.worlds import on_ranks

FULL_MEGABYTES, FULL_PAIRS, RANKS = 1300, 40, 2
TOKENS = 128  # a rank and step
WAIT_S = 900.0
WIDTH, INNER = 1024, 4096
BLOCK = 5  # steps in a row with durable generations back to back
Figures = dict[str, list[float]]


class Training:
    """A model of blocks like those of a transformer without attention, sharded over the ranks."""

    def __init__(self, megabytes: int, tokens: int, device: str) -> None:
        torch.manual_seed(0)
        count = max(1, round(megabytes * 1e6 / 12 / (2 * WIDTH * INNER)))
        self.model = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(count))
        )
        self.model.to(device)
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        for block in self.model:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.fence: Callable[[], None] = lambda: None
        self.inputs = torch.randn(tokens, WIDTH, device=device)
        self.step()

    def step(self) -> None:
        self.model(self.inputs).square().mean().backward()
        self.fence()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize()

    def pieces(self) -> list[Piece]:
        return describe(self.model, self.optimizer)

    def tensors(self) -> dict[str, Any]:
        """The same for DCP: every tensor of parameters and optimizer by name."""
        found: dict[str, Any] = {}
        for name, parameter in self.model.named_parameters():
            found[f"model/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                found[f"optim/{name}/{key}"] = value
        if dist.get_world_size() == 1:  # torch 2.11 cannot stage a DTensor, and nothing is sharded
            return {n: v.to_local() if isinstance(v, DTensor) else v for n, v in found.items()}
        return found


def synchronize() -> None:
    """Until a GPU has done what it was asked to: the time of a step is that of its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Ours:
    def __init__(self, training: Training, memory: Path, disk: Path) -> None:
        self.training = training
        self.snapshots = Snapshotter(disk, memory)
        self.snapshots.prepare(training.pieces())
        self.number = 0
        self.described_s = 0.0

    def submit(self, durable: bool = False) -> None:
        self.number += 1
        began = time.perf_counter()
        pieces = self.training.pieces()
        self.described_s = time.perf_counter() - began
        self.snapshots.snapshot(self.number, pieces, {"step": self.number}, durable=durable)

    def over(self) -> None:
        outcome = self.snapshots.settle()
        assert outcome is None or outcome.generation, outcome


class Dcp:
    """`async_save` into a directory, with buffers that are kept from one save to the next."""

    def __init__(self, training: Training, directory: Path, wanted: bool) -> None:
        self.training, self.directory, self.wanted = training, directory, wanted
        gpu = training.inputs.is_cuda  # without one it stages in the calling thread, and refuses the other options
        self.stager = DefaultStager(StagingOptions(gpu, False, gpu, gpu))
        self.group = dist.new_group()  # its collectives run in the background, beside those of training
        self.future: Any = None

    def submit(self, directory: Path | None = None) -> None:
        writer = FileSystemWriter(
            directory or self.directory, single_file_per_rank=True, sync_files=True, thread_count=1, overwrite=True
        )
        self.future = async_save(
            self.training.tensors(), storage_writer=writer, async_stager=self.stager, process_group=self.group
        )

    def fence(self) -> None:
        """Until the state may change."""
        if (staged := getattr(self.future, "staging_completion", None)) is not None:
            staged.result()

    def over(self) -> None:
        if self.future is not None:
            getattr(self.future, "upload_completion", self.future).result()
            self.future = None


def work(options: argparse.Namespace, top: str) -> Figures:
    """All measurements, on one rank."""
    warnings.simplefilter("ignore")  # DCP's, of what it overwrites, in its threads too
    torch.set_num_threads(1 if options.device == "cpu" else min(8, (os.cpu_count() or 1) // options.ranks))
    rank = int(os.environ["RANK"])
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if options.device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    directory = Path(top)
    training = Training(options.megabytes, options.tokens, options.device)
    shared = Path("/dev/shm", f"evershard-benchmark-{os.environ['MASTER_PORT']}")
    ours = Ours(training, shared, directory / "ours")
    dcp = Dcp(training, shared.with_name(shared.name + "-dcp"), not options.alone)
    figures: Figures = defaultdict(list)
    try:
        take_turns(training, ours, dcp, options.pairs, figures)
        copy_rates(ours, figures)
        durable_in_turns(training, ours, dcp, directory, max(2, options.pairs // 10), figures)
        flush_rates(ours, directory, figures)
        restore_rates(training, ours, directory, figures)
        assert_equal_ends(training, ours, dcp)
    finally:
        ours.snapshots.close(finished=True)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(shared.with_name(shared.name + "-dcp"), ignore_errors=True)
    return dict(figures)


def slowest(seconds: float) -> float:
    told = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


def all_together(value: float) -> float:
    told = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(told)
    return float(told)


def cpu_seconds(keeper: int = 0) -> float:
    """The seconds of this process, with the keeper's on rank 0."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime + (_cpu_of(keeper) if keeper and dist.get_rank() == 0 else 0.0)


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def take_turns(training: Training, ours: Ours, dcp: Dcp, pairs: int, figures: Figures) -> None:
    """A step of each kind, in turn. The first round warms up."""
    keeper = ours.snapshots.keeper_pid

    def nothing() -> None: ...

    def ours_step() -> None:
        training.fence = ours.snapshots.fence
        ours.submit()
        training.step()
        training.fence = nothing

    def dcp_step() -> None:
        waited = 0.0

        def fence() -> None:
            nonlocal waited
            began = time.perf_counter()
            dcp.fence()
            waited += time.perf_counter() - began

        began = time.perf_counter()
        dcp.submit()
        waited = time.perf_counter() - began
        training.fence = fence
        training.step()
        training.fence = nothing
        figures["dcp blocked"].append(slowest(waited))

    kinds: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "none": (training.step, nothing),
        "ours": (ours_step, ours.over),
    }
    if dcp.wanted:
        kinds["dcp"] = dcp_step, dcp.over
    for number in range(pairs + 1):
        names = list(kinds)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            step, over = kinds[name]
            dist.barrier()
            ours.snapshots.blocked_s = ours.described_s = 0.0
            cpu, began = cpu_seconds(keeper), time.perf_counter()
            step()
            figures[f"{name} step"].append(slowest(time.perf_counter() - began))
            if name == "ours":
                figures["ours blocked"].append(slowest(ours.snapshots.blocked_s))
                figures["ours blocked, described"].append(slowest(ours.snapshots.blocked_s + ours.described_s))
            over()
            dist.barrier()
            figures[f"{name} cpu"].append(all_together(cpu_seconds(keeper) - cpu))
    for values in figures.values():
        del values[0]


class Plain:
    """Copies of the whole state to and from warm memory, pinned where there is a GPU, by numpy or torch."""

    def __init__(self, training: Training) -> None:
        self.tensors = [piece.tensor.detach() for piece in training.pieces() if piece.tensor.numel()]
        pinned = training.inputs.is_cuda
        self.copies = [torch.zeros_like(tensor, device="cpu", pin_memory=pinned) for tensor in self.tensors]

    def _copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> float:
        dist.barrier()
        began = time.perf_counter()
        for target, source in zip(targets, sources, strict=True):
            if target.is_cuda or source.is_cuda:
                target.copy_(source, non_blocking=True)
            else:
                np.copyto(target.numpy(), source.numpy())
        synchronize()
        return slowest(time.perf_counter() - began)

    def to_memory(self) -> float:
        return self._copy(self.copies, self.tensors)

    def back(self) -> float:
        return self._copy(self.tensors, self.copies)


def copy_rates(ours: Ours, figures: Figures) -> None:
    """A whole snapshot into a warm arena, and the same bytes copied into warm memory; all ranks at once."""
    plain = Plain(ours.training)
    for _ in range(10):
        dist.barrier()
        ours.submit()
        outcome = ours.snapshots.settle()
        assert outcome is not None and outcome.generation
        figures["copy ours"].append(slowest(outcome.copy_s))
        figures["copy plain"].append(plain.to_memory())


def durable_in_turns(training: Training, ours: Ours, dcp: Dcp, directory: Path, blocks: int, figures: Figures) -> None:
    """Steps in a row while generations become durable one after the other, as fast as they do."""
    state = all_together(float(sum(piece.tensor.nbytes for piece in training.pieces())))
    for number in range(blocks + 1):
        for name in ("none", "ours", "dcp") if dcp.wanted else ("none", "ours"):
            done, began = 0, time.perf_counter()
            for turn in range(BLOCK):
                if name == "ours":
                    training.fence = ours.snapshots.fence
                    ours.over()
                    ours.submit(durable=True)
                elif name == "dcp" and (dcp.future is None or all_done(dcp)):
                    done += dcp.future is not None
                    dcp.over()
                    dcp.submit(directory / "dcp" / f"{number}-{turn}")
                    training.fence = dcp.fence
                training.step()
            steps_s = slowest(time.perf_counter() - began)
            training.fence = lambda: None
            if name == "ours":
                ours.over()
                ours.snapshots.wait_durable(300)
                done = sum(not one.why for one in ours.snapshots.durables())
            elif name == "dcp":
                dcp.over()
                done += 1
            whole_s = slowest(time.perf_counter() - began)
            if number:
                figures[f"{name} durable step"].append(steps_s / BLOCK)
                figures[f"{name} durable rate"].append(done * state / whole_s)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(directory / "dcp", ignore_errors=True)
                for old in sorted((directory / "ours").glob("step-*"))[:-1]:
                    shutil.rmtree(old, ignore_errors=True)
                os.sync()
            dist.barrier()


def all_done(dcp: Dcp) -> bool:
    done = getattr(dcp.future, "upload_completion", dcp.future).done()
    return bool(all_together(float(done)) == dist.get_world_size())


def flush_rates(ours: Ours, directory: Path, figures: Figures) -> None:
    """What the keeper takes from memory to a synced disk, and the same bytes written raw: the faster of two ways."""
    for _ in range(6):
        ours.submit(durable=True)
        ours.over()
        assert ours.snapshots.wait_durable(300)
        (durable,) = ours.snapshots.durables()
        figures["flush ours"].append(durable.seconds / durable.nbytes)
        dist.barrier()
        if dist.get_rank() == 0:
            name = durable.generation
            files = sorted((ours.snapshots.memory / name).glob("shard-*"))
            raw = min(write_raw(files, directory / "raw", flags) for flags in (0, os.O_DIRECT))
            figures["flush raw"].append(raw / sum(file.stat().st_size for file in files))
            for old in sorted((directory / "ours").glob("step-*"))[:-1]:
                shutil.rmtree(old, ignore_errors=True)
            os.sync()
        dist.barrier()


def write_raw(files: list[Path], target: Path, flags: int) -> float:
    views = [
        MappedStorage(file.parent).read_ranges(file.name, [(0, file.stat().st_size // 4096 * 4096)])[0]
        for file in files
    ]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    began = time.perf_counter()
    for number, view in enumerate(views):
        descriptor = os.open(target / str(number), os.O_WRONLY | os.O_CREAT | flags)
        rest = memoryview(view)
        while rest:
            rest = rest[os.write(descriptor, rest[: 16 << 20]) :]
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def restore_rates(training: Training, ours: Ours, directory: Path, figures: Figures) -> None:
    """Load from memory, from the same files on the disk with nothing cached, and by plain copies of the same bytes."""
    plain = Plain(training)
    plain.to_memory()
    memory = MappedStorage(ours.snapshots.memory)
    for _ in range(6):
        dist.barrier()
        began = time.perf_counter()
        load(memory, training.pieces())
        synchronize()
        figures["restore memory"].append(slowest(time.perf_counter() - began))
        if dist.get_rank() == 0:
            for file in (directory / "ours").rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()
        began = time.perf_counter()
        load(directory / "ours", training.pieces())
        synchronize()
        figures["restore disk"].append(slowest(time.perf_counter() - began))
        figures["restore copy"].append(plain.back())


def assert_equal_ends(training: Training, ours: Ours, dcp: Dcp) -> None:
    """What both sides hold at the end is the state, bit for bit."""
    ours.submit()
    if dcp.wanted:
        dcp.submit()
        dcp.over()
    ours.over()
    expected = [piece.tensor.clone() for piece in training.pieces()]

    def clear() -> None:
        with torch.no_grad():
            for piece in training.pieces():
                piece.tensor.zero_()

    def check(side: str) -> None:
        for piece, tensor in zip(training.pieces(), expected, strict=True):
            assert torch.equal(piece.tensor, tensor), f"{side}: {piece.name}"

    clear()
    load(MappedStorage(ours.snapshots.memory), training.pieces())
    check("ours")
    if not dcp.wanted:
        return
    clear()
    dcp_load(training.tensors(), storage_reader=FileSystemReader(dcp.directory))
    check("dcp")


def rows_of(figures: Figures, *, full: bool) -> list[Row]:
    def row(name: str, unit: str, ours: list[float], peer: list[float], peer_name: str, bar: float | None) -> Row:
        return compared(name, unit, ours, peer, peer_name, bar=bar, full=full)

    def more(name: str, unit: str, ours: list[float], peer: list[float], peer_name: str, bar: float) -> Row:
        """A row of figures of which higher is better."""
        ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
        reached = ratio >= bar if full else None
        return Row(
            name, unit, statistics.median(ours), statistics.median(peer), peer_name, ratio, "higher", bar, reached
        )

    def at_99(values: list[float]) -> list[float]:
        return [sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]] * 2

    blocked, stage = figures["ours blocked"], figures.get("dcp blocked", [])
    paired = [a - b for a, b in zip(figures["ours step"], figures["none step"], strict=True)]

    def invert(values: list[float]) -> list[float]:
        return [1 / value for value in values]

    rows = [
        row("step with a snapshot", "s", figures["ours step"], figures["none step"], "without", 1.05),
        row(
            "step while generations become durable",
            "s",
            figures["ours durable step"],
            figures["none durable step"],
            "without",
            1.15,
        ),
        more(
            "copy into a warm arena",
            "1/s",
            invert(figures["copy ours"]),
            invert(figures["copy plain"]),
            "plain copy",
            0.6,
        ),
        more("flush", "B/s", invert(figures["flush ours"]), invert(figures["flush raw"]), "raw write and fsync", 0.85),
        more(
            "restore from memory",
            "1/s",
            invert(figures["restore memory"]),
            invert(figures["restore disk"]),
            "from a disk, uncached",
            2.5,
        ),
        more(
            "restore from memory against a copy",
            "1/s",
            invert(figures["restore memory"]),
            invert(figures["restore copy"]),
            "plain copy",
            0.4,
        ),
    ]
    snapshots = [a - b for a, b in zip(figures["ours cpu"], figures["none cpu"], strict=True)]
    print(
        f"step without a snapshot {statistics.median(figures['none step']):.3f} s; with one the wall clock differs by "
        f"{statistics.median(paired):.4f} s (median of pairs), and training says it was blocked for "
        f"{statistics.median(blocked):.4f} s; CPU {statistics.median(snapshots):.2f} s a snapshot",
        file=sys.stderr,
    )
    if not stage:
        return rows
    peers = [a - b for a, b in zip(figures["dcp cpu"], figures["none cpu"], strict=True)]
    return [
        row("blocked by a snapshot, median", "s", blocked, stage, "DCP async_save, cached stager", 0.05),
        row(
            "the same with describing the state",
            "s",
            figures["ours blocked, described"],
            stage,
            "DCP async_save, cached stager",
            None,
        ),
        row("blocked by a snapshot, p99", "s", at_99(blocked), [statistics.median(stage)] * 2, "DCP's median", 0.2),
        *rows,
        row(
            "the same under DCP",
            "s",
            figures["dcp durable step"],
            figures["none durable step"],
            "without",
            None,
        ),
        more(
            "made durable meanwhile",
            "B/s",
            figures["ours durable rate"],
            figures["dcp durable rate"],
            "DCP async_save",
            1.0,
        ),
        row(
            "CPU seconds of a snapshot",
            "s",
            [statistics.median(snapshots)] * 2,
            [statistics.median(peers)] * 2,
            "DCP async_save",
            1.3,
        ),
    ]


QUICK = {"megabytes": 40, "pairs": 4}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=FULL_MEGABYTES, help="of the state of all ranks")
    parser.add_argument("--pairs", type=int, default=FULL_PAIRS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, default=RANKS, help="processes, on GPUs one each")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a rank and step")
    parser.add_argument("--alone", action="store_true", help="without DCP, as where its stager fails")
    parser.add_argument("--figures", type=Path, help="write every measurement to this file too")
    options = options_of(parser, QUICK)
    with tempfile.TemporaryDirectory() as top:
        figures = on_ranks(work, options.ranks, options, top, wait_s=WAIT_S, environment=True)[0]
    if options.figures:
        options.figures.write_text(json.dumps(figures))
    full = options.megabytes >= FULL_MEGABYTES and options.pairs >= FULL_PAIRS and options.device == "cpu"
    return finish("memory", rows_of(figures, full=full), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
