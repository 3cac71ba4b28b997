"""How many bytes a load asks the kernel for, over the bytes it needs, when the shard axis changes.

    python -m benchmarks.reads [--json] [--largest N]

Matrices of 1 MiB and more are saved as Shard(0) and loaded as Shard(1), and the reverse, by 2 to 8 ranks, under strace:
what counts is what read calls on the checkpoint's files ask for, manifests, indexes and headers included, and that
nothing maps them instead.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.crash_ranks import why_no_strace
from benchmarks.report import Row, absolute, finish, options_of
from checkpointing import Piece, load, save
from tests.harness.worlds import on_ranks

SHAPES = [(512, 512), (700, 400), (1000, 1049), (2048, 2048), (4096, 1024), (1024, 8192), (8192, 640)]
LARGEST = 8
DIVIDING = (2, 4, 8)
TRACED = ["-f", "-qq", "-y", "-s", "1", "-e", "abbrev=none", "-e", "trace=read,pread64,readv,preadv,preadv2,mmap"]
WAIT_S = 600

# A call's process, and the file with all after it; of a call that another came between, the second half of it.
_BEGUN = re.compile(r"(\d+) +(?:read|pread64|readv|preadv2?)\(\d+<(.*?)>(.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (?:read|pread64|readv|preadv2?) resumed>(.*)")


def shards(dim: int, rank: int, size: int, *, fill: bool) -> list[Piece]:
    """This rank's pieces, cut as `torch.chunk` cuts: a rank beyond the end has none."""
    pieces = []
    for number, shape in enumerate(SHAPES):
        step = -(-shape[dim] // size)
        start, stop = min(rank * step, shape[dim]), min((rank + 1) * step, shape[dim])
        if start == stop:
            continue
        offset = (start, 0) if dim == 0 else (0, start)
        local = torch.zeros((stop - start, shape[1]) if dim == 0 else (shape[0], stop - start))
        if fill:
            rows, columns = (torch.arange(o, o + n) for o, n in zip(offset, local.shape, strict=True))
            local.copy_(((rows[:, None] * 31 + columns[None, :] * 7 + number) % 8191).float())
        pieces.append(Piece(f"model/{number}", local, offset, shape))
    return pieces


def work(largest: int, directory: str) -> None:
    """Save and load among the first 2, 3, ... ranks; every case in a directory that its name tells."""
    warnings.filterwarnings("ignore")
    rank = dist.get_rank()
    for size in range(2, largest + 1):
        group = dist.new_group(list(range(size)))
        if rank < size:
            for dim in (0, 1):
                top = Path(directory, case(size, dim))
                save(top, 1, shards(dim, rank, size, fill=True), group=group)
                target = shards(1 - dim, rank, size, fill=False)
                load(top, target, group=group)
                for piece, expected in zip(target, shards(1 - dim, rank, size, fill=True), strict=True):
                    assert torch.equal(piece.tensor, expected.tensor), piece.name


def case(size: int, dim: int) -> str:
    return f"{size}-ranks-{dim}-to-{1 - dim}"


def asked(trace: str, directory: str) -> Counter[str]:
    """Bytes that read calls ask for on files below the directory, by the first part of their names."""
    found: Counter[str] = Counter()
    waiting: dict[str, str] = {}
    for line in trace.splitlines():
        if "mmap(" in line:
            assert f"<{directory}/" not in line, f"mapped, and not read: {line}"
        elif begun := _BEGUN.match(line):
            process, path, rest = begun.groups()
            if not path.startswith(f"{directory}/"):
                continue
            top = path.removeprefix(f"{directory}/").partition("/")[0]
            if "<unfinished" in rest:
                waiting[process] = top
            else:
                found[top] += size_of(rest)
        elif (resumed := _RESUMED.match(line)) and resumed[1] in waiting:
            found[waiting.pop(resumed[1])] += size_of(resumed[2])
    assert not waiting, waiting
    return found


def size_of(arguments: str) -> int:
    """What a call asks for: the length of its buffers, or its count, which follows the buffer."""
    if vector := re.findall(r"iov_len=(\d+)", arguments):
        return sum(map(int, vector))
    match = re.search(r'"(?:\.\.\.)?, (\d+)', arguments)
    assert match is not None, f"a read call of unknown size: {arguments}"
    return int(match[1])


def run(largest: int) -> list[Row]:
    if why := why_no_strace():
        raise SystemExit(f"benchmarks.reads counts read calls with strace: {why}. Install it and run this again.")
    with tempfile.TemporaryDirectory() as directory:
        top, trace = os.path.realpath(directory), Path(directory, "trace")
        program = f"from benchmarks.reads import start; start({largest}, {top!r})"
        subprocess.run(
            ["strace", *TRACED, "-o", str(trace), sys.executable, "-c", program],
            check=True,
            timeout=WAIT_S,
            cwd=Path(__file__).parents[1],
        )
        found = asked(trace.read_text(), top)
    needed = sum(rows * columns * 4 for rows, columns in SHAPES)
    rows = []
    for size in range(2, largest + 1):
        for dim in (0, 1):
            factor = found[case(size, dim)] / needed
            name = f"bytes asked for over bytes needed, Shard({dim}) to Shard({1 - dim}), {size} ranks"
            rows.append(absolute(name, "", factor, better="lower", bar=1.05 if size in DIVIDING else 1.4))
            assert factor >= 1, f"{name}: {factor}; some calls were not seen"
    return rows


def start(largest: int, directory: str) -> None:
    on_ranks(work, largest, largest, directory, wait_s=WAIT_S)


QUICK = {"largest": 3}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reads", description=__doc__)
    parser.add_argument("--largest", type=int, default=LARGEST, help=f"number of ranks (default {LARGEST})")
    arguments = options_of(parser, QUICK)
    if arguments.largest < 2:
        parser.error("--largest must be 2 at least: one rank changes no shard axis")
    return finish("reads", run(arguments.largest), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
