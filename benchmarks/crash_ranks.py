"""The saves that a campaign records: ranks that save a second generation, each under strace.

    python -m benchmarks.crash_ranks TOP RANK SIZE PORT CASE...    (one rank; `record` starts them all)

Every case has a directory of its own below TOP, with the first generation in it. When `save` has returned on a rank,
the rank says so by a file beside them, which the traces tell in its place among the other operations.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.crash_model import Disk, Operation
from benchmarks.crash_trace import OPTIONS, below, operations
from checkpointing import Piece, save
from checkpointing.collective import Team
from checkpointing.format import COMMIT
from checkpointing.small_files import Buffer
from checkpointing.storage import FileStorage
from tests.harness.ports import free_port

OLD, NEW = 1, 2
SOUND, WITHOUT_SYNC, COMMIT_FIRST = "sound", "sync", "order"
WAIT_S = 120
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Recording:
    """What lay in a directory, what `save` did to it, and what lies there now."""

    start: Disk
    operations: Sequence[Operation]
    end: Disk
    num_ranks: int


def state(step: int) -> dict[str, torch.Tensor]:
    """Tensors that no other step has: cut into panels, large enough for a write alone, packed, and a scalar."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model/matrix": torch.rand(120, 300, generator=generator),  # for two ranks 72 kB each: cut, as from 64 KiB on
        "model/vector": torch.rand(150_000, generator=generator),  # and 300 kB: a write of its own, as from 256 KiB on
        "model/halves": torch.rand(40, 60, generator=generator).bfloat16(),
        "model/small": torch.rand(3, 5, generator=generator),
        "buffer/counts": torch.randint(1, 2**40, (7,), generator=generator),
        "optim/matrix/step": torch.tensor(float(step)),
    }


def objects(step: int) -> dict[str, Any]:
    return {"step": step, "cursor": [step, 0.5], "note": f"of step {step} " * 20}


def pieces(tensors: dict[str, torch.Tensor], rank: int, size: int) -> list[Piece]:
    """This rank's share: rows of the larger tensors, everything else replicated."""
    made = []
    for name, tensor in tensors.items():
        rows = len(tensor) if tensor.dim() else 0
        if rows < size or tensor.numel() < 1000:
            made.append(Piece(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)))
            continue
        start, stop = rows * rank // size, rows * (rank + 1) // size
        made.append(Piece(name, tensor[start:stop], (start, *[0] * (tensor.dim() - 1)), tuple(tensor.shape)))
    return made


def save_step(step: int, directory: Path, team: Team, case: str = SOUND) -> None:
    storage = CommitFirst(directory) if case == COMMIT_FIRST and team.rank == 0 else FileStorage(directory)
    save(storage, step, pieces(state(step), team.rank, team.size), objects(step), team)


class CommitFirst(FileStorage):
    """Wrong on purpose: what this rank writes reaches the disk only after COMMIT did."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._held: dict[str, bytes] = {}

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        self._held[name] = b"".join(chunks)

    def list(self, prefix: str = "") -> dict[str, int]:
        held = {name: len(data) for name, data in self._held.items() if name.startswith(prefix)}
        return super().list(prefix) | held

    def create_if_absent(self, name: str, data: bytes) -> bool:
        created = super().create_if_absent(name, data)
        if name.endswith(f"/{COMMIT}"):
            for held in list(self._held):
                super().put(held, [self._held.pop(held)])
        return created


@contextmanager
def without_sync() -> Iterator[None]:
    """Wrong on purpose: nothing is synced by this process."""
    kept = os.fsync, os.fdatasync
    os.fsync = os.fdatasync = lambda fd: None
    try:
        yield
    finally:
        os.fsync, os.fdatasync = kept


def why_no_strace() -> str | None:
    """Why processes cannot be traced here; None if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", *OPTIONS, "-o", os.devnull, "true"], capture_output=True, text=True, timeout=30)
    return f"strace does not work here: {tried.stderr.strip()}" if tried.returncode else None


def save_old(directory: Path) -> None:
    save_step(OLD, directory, Team())


def record(
    top: Path,
    num_ranks: int,
    cases: Sequence[str],
    prepare: Callable[[Path], None] = save_old,
    module: str = "benchmarks.crash_ranks",
) -> dict[str, Recording]:
    """Save once in every case, all cases in the same processes, and read their traces."""
    top = top.resolve()
    starts = {}
    for case in cases:
        prepare(top / case)
        starts[case] = Disk.at(top / case)
        (top / "returned" / case).mkdir(parents=True)
    traces = [top / f"trace-{rank}" for rank in range(num_ranks)]
    _run_ranks(top, traces, cases, module)
    found = [op for rank, trace in enumerate(traces) for op in operations(trace.read_text(), top, rank)]
    recordings = {}
    for case in cases:
        marks = [op for op in below(found, f"returned/{case}") if op.kind == "open"]
        done = [*below(found, case), *(replace(op, kind="returned", path="") for op in marks)]
        recordings[case] = Recording(starts[case], done, Disk.at(top / case), num_ranks)
    return recordings


def _run_ranks(top: Path, traces: Sequence[Path], cases: Sequence[str], module: str) -> None:
    """Start every rank and wait; if one fails or the time is up, none is left."""
    port = str(free_port())
    processes = []
    errors = [tempfile.TemporaryFile() for _ in traces]  # noqa: SIM115  # not below `top`, where all is recorded
    try:
        for rank, (trace, error) in enumerate(zip(traces, errors, strict=True)):
            arguments = [str(top), str(rank), str(len(traces)), port, *cases]
            processes.append(
                subprocess.Popen(
                    ["strace", *OPTIONS, "-o", str(trace), sys.executable, "-m", module, *arguments],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=error,
                    stderr=error,
                    start_new_session=True,
                )
            )
        deadline = time.monotonic() + WAIT_S
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # strace and what it traces
            process.wait()
    for rank, (process, error) in enumerate(zip(processes, errors, strict=True)):
        error.seek(0)
        said = error.read().decode(errors="replace")
        error.close()
        if process.returncode:
            raise RuntimeError(f"rank {rank} ended with {process.returncode}:\n{said[-4000:]}")


def main(top: str, rank: str, size: str, port: str, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=WAIT_S / 2),
    )
    for case in cases:
        with without_sync() if case == WITHOUT_SYNC else nullcontext():
            save_step(NEW, Path(top, case), Team(), case)
        Path(top, "returned", case, rank).touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
