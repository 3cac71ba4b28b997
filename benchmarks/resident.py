"""How much memory a save and a load take above the state that they save and load.

    python -m benchmarks.resident [--json] [--megabytes N]

The kernel's own mark of the highest resident size (VmHWM of /proc/self/status), set back before each, on the rank that
takes most: of contiguous tensors, of views that must be copied, of other dtypes that are cast, of the other shard axis.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.report import Row, absolute, cores, finish, options_of
from checkpointing import Piece, load, save
from tests.harness.worlds import on_ranks

SIDE = 2048
RANKS = 2
BUDGET_MIB = 256.0  # the library's default
FULL_MEGABYTES = 1300
WAIT_S = 900.0


def shards(count: int, dim: int, *, transposed: bool = False, dtype: torch.dtype = torch.float32) -> list[Piece]:
    """This rank's half of square matrices along a dimension, filled; transposed ones are not contiguous."""
    rank, half = dist.get_rank(), SIDE // RANKS
    size = (half, SIDE) if dim == 0 else (SIDE, half)
    pieces = []
    for number in range(count):
        local = torch.full(size[::-1] if transposed else size, float(number), dtype=dtype)
        offset = (rank * half, 0) if dim == 0 else (0, rank * half)
        pieces.append(Piece(f"model/{number}", local.T if transposed else local, offset, (SIDE, SIDE)))
    return pieces


def peak_above(action: Callable[[], object]) -> float:
    """MiB above what was resident before, on the rank that took most."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    found = torch.tensor([resident("VmHWM") - before], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def resident(what: str) -> float:
    """MiB."""
    match = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def measure(directory: Path, megabytes: int) -> dict[str, float]:
    count = max(1, round(megabytes * 1e6 / (SIDE * SIDE * 4)))
    found = {}
    small = shards(1, 0)
    save(directory / "first", 1, small)  # what is made at the first use of anything
    load(directory / "first", small)
    for name, options in (("contiguous", {}), ("views", {"transposed": True})):
        pieces = shards(count, 0, **options)  # type: ignore[arg-type]
        found[f"save, {name}"] = peak_above(lambda p=pieces, n=name: save(directory / n, 1, p))  # type: ignore[misc]
    del pieces
    numel = count * SIDE * SIDE // RANKS
    vector = Piece("v", torch.zeros(2 * numel)[::2], (dist.get_rank() * numel,), (RANKS * numel,))
    found["save, a vector of every other element"] = peak_above(partial(save, directory / "vector", 1, [vector]))
    del vector
    for name, dim, dtype in (
        ("same layout", 0, torch.float32),
        ("other axis", 1, torch.float32),
        ("cast", 0, torch.float16),
    ):
        target = shards(count, dim, dtype=dtype)
        found[f"load, {name}"] = peak_above(lambda p=target: load(directory / "contiguous", p, cast=True))  # type: ignore[misc]
        assert all(bool((piece.tensor == n).all()) for n, piece in enumerate(target)), name
        del target
    return found


def work(directory: str, megabytes: int) -> dict[str, float]:
    """Peaks above the state, in MiB."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(max(1, cores() // RANKS))
    return measure(Path(directory), megabytes)


def run(megabytes: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        found = on_ranks(work, RANKS, directory, megabytes, wait_s=WAIT_S)[0]
    full = megabytes >= FULL_MEGABYTES
    what = f"peak memory above {megabytes / 1000:g} GB on {RANKS} ranks"
    return [
        absolute(f"{what}, {name}", "MiB", mib, better="lower", bar=BUDGET_MIB, full=full)
        for name, mib in found.items()
    ]


QUICK = {"megabytes": 40}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=FULL_MEGABYTES, help=f"of state (default {FULL_MEGABYTES})")
    arguments = options_of(parser, QUICK)
    return finish("resident", run(arguments.megabytes), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
