"""What grows: a checkpoint of 70 billion parameters from 1,024 writers, and a directory of 10,000 generations.

    python -m benchmarks.scale [--json] [--quick] [--writers N] [--generations N]

The first without its data: what describes it.
Manifest and indexes of fp32 parameters and both moments of Adam, sharded along the first dimension, are encoded, hashed
and written with as many checksums as the real ones have; then one rank of 1,000 reads the manifest and the indexes it
needs, and plans its load. Writers are independent, so as many work at a time as there are cores.

The second is a run that keeps everything: what one more save, one retention and `ls` take, in a process that has looked
at the directory before, as that of a run has, and `ls` in a new one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from benchmarks.report import Row, absolute, cores, finish, options_of
from checkpointing import Keep, Piece, prune, save
from checkpointing.codec import decode_index, decode_manifest, encode_index, encode_manifest
from checkpointing.format import (
    COMMIT,
    FEW_WRITERS,
    MANIFEST,
    Index,
    LogicalTensor,
    Manifest,
    StoredBox,
    Writer,
    box_sums_size,
    cover,
    digest,
    index_name,
)
from checkpointing.generations import newest
from checkpointing.geometry import Box
from checkpointing.plan import plan_load, stored_by_name, writers_needed
from checkpointing.storage import FileStorage

WRITERS, READERS = 1024, 1000
GENERATIONS = 10_000
SAVE_ID = "70" * 16


@lru_cache(1)
def tensors(writers: int) -> dict[str, LogicalTensor]:
    """Llama's shapes at 70 billion parameters: 80 layers of 8192, grouped queries."""
    hidden, inner, kv, vocabulary = 8192, 28672, 1024, 128256
    shapes = {"embed": (vocabulary, hidden), "head": (vocabulary, hidden), "norm": (hidden,)}
    for n in range(80):
        layer = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        layer |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        shapes |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
        shapes |= {f"layers.{n}.norm{m}": (hidden,) for m in range(2)}
    kinds = ("model/{}", "optim/{}/exp_avg", "optim/{}/exp_avg_sq")
    named = tuple(range(writers)) if writers <= FEW_WRITERS else None
    return dict(sorted((k.format(n), LogicalTensor("F32", shape, named)) for n, shape in shapes.items() for k in kinds))


def shard(shape: tuple[int, ...], rank: int, size: int) -> Box | None:
    """Rows as `torch.chunk` deals them; None where the rank gets none."""
    step = -(-shape[0] // size)
    start, stop = min(rank * step, shape[0]), min((rank + 1) * step, shape[0])
    return Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])) if start < stop else None


def write_index(directory: str, writers: int, rank: int) -> Writer:
    """One writer's index, as it is written beside its shard."""
    all_tensors = tensors(writers)
    shards = {shape: shard(shape, rank, writers) for shape in {t.shape for t in all_tensors.values()}}
    sizes = {box: (box.numel * 4, box_sums_size(box, LogicalTensor("F32", s))) for s, box in shards.items() if box}
    boxes, start, sums = [], 0, 0
    for name, tensor in all_tensors.items():
        if (box := shards[tensor.shape]) is not None:
            boxes.append(StoredBox(name, box, start, sums))
            start, sums = start + sizes[box][0], sums + sizes[box][1]
    checksums = bytes(sums)  # they cost what real ones do, and are not checked
    text = encode_index(Index(SAVE_ID, boxes, digest(checksums), {}, {}), all_tensors)
    hashed = digest(text)
    Path(directory, index_name(rank)).write_bytes(text)
    Path(directory, f"checksums-{rank}").write_bytes(checksums)  # the end of the shard, which is not written here
    covered = cover((box, shape) for shape, box in shards.items() if box is not None)
    return Writer(rank, 4096 + start + sums, len(text), hashed, hashed, covered)


def measure(directory: str, writers: int) -> tuple[float, float, int, float]:
    """Seconds to write, seconds until a rank has planned, how many boxes were written, GB of the largest process."""
    tensors(writers)  # made before anything is timed, as in a writer that is training
    with multiprocessing.get_context("fork").Pool(cores()) as pool:
        pool.map(abs, range(cores()))  # started before anything is timed
        began = time.perf_counter()
        written = pool.map(partial(write_index, directory, writers), range(writers), chunksize=8)
    manifest = Manifest(
        step=1, save_id=SAVE_ID, parent="", run_id="", incarnation=0, serial=1, created=0.0, world_size=writers,
        versions={}, metrics={}, writers=written, tensors=tensors(writers),
    )  # fmt: skip
    Path(directory, "manifest.json").write_bytes(encode_manifest(manifest))
    between = time.perf_counter()
    assert plan_one(directory) > 0
    planned = time.perf_counter() - between
    count = sum(min(writers, -(-t.shape[0] // -(-t.shape[0] // writers))) for t in manifest.tensors.values())
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e6
    return between - began, planned, count, peak


def plan_one(directory: str) -> int:
    """A rank in the middle of another number of ranks: what it reads and plans; the number of reads."""
    manifest = decode_manifest(Path(directory, "manifest.json").read_bytes(), "manifest")
    held = ((name, t, shard(t.shape, READERS // 2, READERS)) for name, t in manifest.tensors.items())
    pieces = [
        Piece(name, torch.empty(box.size, device="meta"), box.offset, t.shape)
        for name, t, box in held
        if box is not None
    ]
    indexes = {}
    for position in sorted(writers_needed(pieces, manifest)):
        data = Path(directory, index_name(manifest.writers[position].rank)).read_bytes()
        assert digest(data) == manifest.writers[position].index
        indexes[position] = decode_index(data, manifest, "index")
    return len(plan_load(pieces, stored_by_name(indexes), manifest.tensors))


def keep(directory: Path, generations: int) -> tuple[float, float, float]:
    """Seconds of one more save, of retention, and of `ls` where a run has kept so many generations."""
    pieces = [Piece("model/w", torch.ones(8), (0,), (8,))]
    save(directory, 0, pieces)
    first = newest(FileStorage(directory))
    assert first is not None and first.manifest is not None
    for step in range(1, generations):
        manifest = replace(first.manifest, step=step, save_id=secrets.token_hex(16), serial=step + 1)
        copy = directory / manifest.generation
        copy.mkdir()
        for name in first.files.keys() - {MANIFEST, COMMIT}:
            os.link(directory / first.name / name, copy / name)
        data = encode_manifest(manifest)
        (copy / MANIFEST).write_bytes(data)
        (copy / COMMIT).write_text(digest(data))
    time.sleep(2)  # a directory that changed within a second or so may change again under the same stamp
    save(directory, generations, pieces)  # the first in this process looks at each
    began = time.perf_counter()
    save(directory, generations + 1, pieces)
    saved = time.perf_counter()
    assert prune(FileStorage(directory), Keep(last=2, every=1)) == []
    pruned = time.perf_counter()
    command = [sys.executable, "-m", "checkpointing", "ls", str(directory)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert listed.stdout.count(" committed\n") == generations + 2
    return saved - began, pruned - saved, time.perf_counter() - pruned


def run(writers: int, generations: int) -> list[Row]:
    spawned = multiprocessing.get_context("spawn")  # new processes, whose memory is that of this measurement alone
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(1, spawned) as pool:
        wrote, planned, boxes, peak = pool.submit(measure, directory, writers).result()
    with tempfile.TemporaryDirectory() as directory:
        saved, pruned, listed = keep(Path(directory), generations)
    full = writers == WRITERS and generations == GENERATIONS
    kept = f"{generations:,} generations"
    what = f"70B Adam from {writers:,} writers, {boxes / 1e6:.1f} million boxes"
    return [
        absolute(
            f"{what}: manifest and indexes written, parsed, one load planned",
            "s",
            wrote + planned,
            better="lower",
            bar=5.0,
            full=full,
        ),
        absolute(f"{what}: of it parsed and planned", "s", planned, better="lower", bar=5.0, full=full),
        absolute(f"{what}: memory of the largest process", "GB", peak, better="lower", bar=2.0, full=full),
        absolute(f"{kept}: one more save", "s", saved, better="lower", bar=0.3, full=full),
        absolute(f"{kept}: retention", "s", pruned, better="lower", bar=0.3, full=full),
        absolute(f"{kept}: ls", "s", listed, better="lower", bar=3.0, full=full),
    ]


QUICK = {"writers": 256, "generations": 1000}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--writers", type=int, default=WRITERS, help=f"ranks that wrote it (default {WRITERS})")
    parser.add_argument("--generations", type=int, default=GENERATIONS, help=f"kept (default {GENERATIONS})")
    arguments = options_of(parser, QUICK)
    if min(arguments.writers, arguments.generations) < 1:
        parser.error("--writers and --generations must be 1 at least")
    return finish("scale", run(arguments.writers, arguments.generations), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
