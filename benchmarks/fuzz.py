"""Hostile checkpoints: valid files, changed, with their checksums repaired so that the change is believed.

    python -m benchmarks.fuzz [--seconds N] [--seed N] [--plant] [--json]

Each case changes one or two of the files of a small valid checkpoint (a value of the JSON, a key, or bytes), repairs
every digest, size and checksum above the change, and then does all that is done with checkpoints: list, load, verify,
compare, prune. Nothing but this library's own errors may come of it, within a bound on memory and time, and no name
outside the generation may be touched. With --plant a check is taken out of the parser, and the campaign must find that.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from benchmarks.report import absolute, finish, options_of
from checkpointing import CheckpointError, External, Keep, Piece, codec, load, prune
from checkpointing.codec import decode_index, decode_manifest, encode_manifest
from checkpointing.diff import compare
from checkpointing.format import (
    COMMIT,
    MANIFEST,
    ExternalTensor,
    Manifest,
    block_size,
    checksums,
    digest,
    index_name,
    shard_name,
    stored_bytes,
    stored_panels,
)
from checkpointing.generations import scan
from checkpointing.plan import layout_rows, plan_save
from checkpointing.reader import GenerationReader
from checkpointing.retention import clear_leftovers
from checkpointing.stores import MemoryStorage
from checkpointing.tree import render_tree
from checkpointing.writer import write_shard

Files = dict[str, bytes]
CASE_S = 10  # a case takes milliseconds; one that takes so long hangs
MEMORY_BYTES = 2**30  # above what the process has when it begins

NUMBERS: list[Any] = [-1, 0, 1, 2, 3, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, 1e308, True]
TEXTS: list[Any] = ["", "a", "0" * 16, "0" * 32, "../../x", "/etc/passwd", "F32", "BF16", "\ud800", "\x00", "é" * 9]
OTHERS: list[Any] = [None, [], {}, [[]], [0], [1, 1], [0, 0, 0], {"a": 1}, [None]]
TOKENS = [b"NaN", b"Infinity", b"-0", b"1e999", b"null", b'"', b"{", b"[", b"]", b",", b"\\u0000", b"9" * 30, b"\xff"]


class Guarded(MemoryStorage):
    """A storage that notes names outside of a generation and of the leases."""

    def __init__(self, files: Files) -> None:
        super().__init__()
        self._objects = dict(files)
        self.strange: list[str] = []
        self._allowed = (f"{generation_of(files)}/", "hold-")

    def _note(self, name: str) -> None:
        if not name.startswith(self._allowed):
            self.strange.append(name)

    def put(self, name: str, chunks: Any) -> None:
        self._note(name)
        super().put(name, chunks)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytearray | memoryview]:
        self._note(name)
        return super().read_ranges(name, ranges)

    def create_if_absent(self, name: str, data: bytes) -> bool:
        self._note(name)
        return super().create_if_absent(name, data)

    def delete(self, names: Any) -> None:
        given = list(names)
        for name in given:
            self._note(name)
        super().delete(given)


def layouts() -> list[list[Piece]]:
    """Three ranks: shards that are packed and others that are cut, replicas, a tie, scalars, an empty tensor."""
    wide, tied = torch.arange(48 * 400, dtype=torch.float32).reshape(48, 400), torch.ones(5, 3)
    ranks = []
    for rank in range(3):
        own = [Piece("model/wide", wide[16 * rank : 16 * rank + 16].clone(), (16 * rank, 0), (48, 400))]
        own += [Piece(name, tied, (0, 0), (5, 3)) for name in ("model/a", "model/tied")]
        own.append(Piece("model/flat", torch.arange(4, dtype=torch.int16), (4 * rank,), (12,)))
        own += [Piece("optim/step", torch.tensor(3.0), (), ()), Piece("model/none", torch.zeros(0, 2), (0, 0), (0, 2))]
        ranks.append(own)
    return ranks


EXTERNAL = External("model/base", torch.bfloat16, (2, 2), "a hub id", "5e" * 32)


def valid() -> Files:
    """A small checkpoint with something of everything, as its files."""
    storage, ranks, save_id = MemoryStorage(), layouts(), "8a" * 16
    plan = plan_save([layout_rows(pieces) for pieces in ranks], few_writers=2)  # so that some do not name them
    name = f"step-00000007-{save_id[:8]}"
    objects = {"step": 7, "lr": 0.1, "nested": {"list": [1, None, "x"]}}
    written = [
        write_shard(storage, name, plan.of(rank), pieces, rank, save_id, objects if rank == 0 else {})
        for rank, pieces in enumerate(ranks)
    ]
    external = {EXTERNAL.name: ExternalTensor("BF16", EXTERNAL.shape, EXTERNAL.source, EXTERNAL.sha256)}
    manifest = Manifest(
        step=7,
        save_id=save_id,
        parent="",
        run_id="fuzz",
        incarnation=1,
        serial=1,
        created=1.0,
        world_size=len(ranks),
        versions={"torch": "2"},
        metrics={"loss": 0.5},
        writers=[writer for writer in written if writer],
        tensors=plan.tensors,
        aliases=plan.aliases,
        external=external,
    )
    storage.put(f"{name}/{MANIFEST}", [encode_manifest(manifest)])
    files = {path: bytes(storage.read_ranges(path, [(0, size)])[0]) for path, size in storage.list().items()}
    return repaired(files)


def generation_of(files: Files) -> str:
    return next(iter(files)).partition("/")[0]


def changed(files: Files, rng: random.Random) -> Files:
    """One or two changes, most of them to a value somewhere in the JSON; then all that vouches for them repaired."""
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2])):
        indexes = [name for name in files if "/index-" in name]
        name = rng.choice([f"{generation_of(files)}/{MANIFEST}", rng.choice(indexes), rng.choice(list(files))])
        if name.endswith(".json") and rng.random() < 0.8:
            files[name] = change_json(files[name], rng)
        elif name.endswith(".safetensors") and rng.random() < 0.5:
            files[name] = change_header(files[name], rng)
        else:
            files[name] = change_bytes(files[name], rng)
    return repaired(files) if rng.random() < 0.95 else files


def change_json(data: bytes, rng: random.Random) -> bytes:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, rng)
    inner, key = document, None
    while isinstance(inner, dict | list) and inner:
        outer, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = outer[key]
        if rng.random() < 0.25:
            break
    if key is None:
        return change_bytes(data, rng)
    kind = rng.randrange(6)
    if kind == 0:
        del outer[key]
    elif kind == 1 and isinstance(outer, list):
        outer.insert(key, inner)
    elif kind == 1:
        outer[rng.choice(TEXTS)] = inner
    elif kind == 2 and isinstance(inner, int):
        outer[key] = inner + rng.choice([-1, 1, 8, 16, -16])
    elif kind == 3 and isinstance(outer, list):
        other = rng.randrange(len(outer))
        outer[key], outer[other] = outer[other], outer[key]
    else:
        outer[key] = rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS]))
    text = json.dumps(document, separators=(",", ":")).encode()
    return text.replace(b'"step":7', b'"step":7,"step":8') if rng.random() < 0.02 else text


def change_header(data: bytes, rng: random.Random) -> bytes:
    """The JSON of a shard's header, or its length."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data):  # a change before this one
        return change_bytes(data, rng)
    if rng.random() < 0.2:
        return rng.choice([0, 7, length + 1, 2**40, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    header = change_json(data[8 : 8 + length].rstrip(), rng)
    return data[:8] + header.ljust(length)[:length] + data[8 + length :]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.choice(TOKENS) + data[at + rng.randint(0, 4) :]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def repaired(files: Files) -> Files:
    """Every size, digest and checksum as if the files had been written like this, as far as they can be read at all."""
    files, name = dict(files), generation_of(files)
    try:
        document = json.loads(files[f"{name}/{MANIFEST}"])
        for writer in document["writers"]:
            repair_writer(files, name, document, writer)
        files[f"{name}/{MANIFEST}"] = json.dumps(document, separators=(",", ":")).encode()
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError):
        pass  # what is left of it is tried as it is
    files[f"{name}/{COMMIT}"] = digest(files.get(f"{name}/{MANIFEST}", b"")).encode()
    return files


def repair_writer(files: Files, name: str, document: dict[str, Any], writer: dict[str, Any]) -> None:
    index, shard = f"{name}/{index_name(writer['rank'])}", f"{name}/{shard_name(writer['rank'])}"
    if index not in files or shard not in files:
        return
    length = 8 + int.from_bytes(files[shard][:8], "little")
    files[index], files[shard] = repair_index(files[index], files[shard], length, document)
    writer |= {"shard_bytes": len(files[shard]), "index_bytes": len(files[index])}
    writer |= {"header": digest(files[shard][:length]), "index": digest(files[index])}


def repair_index(text: bytes, shard: bytes, length: int, document: dict[str, Any]) -> tuple[bytes, bytes]:
    """Index and shard with the checksums of what lies where the boxes now say."""
    try:
        manifest = decode_manifest(json.dumps(document).encode(), "")
        raw = json.loads(text)
        boxes = decode_index(text, manifest, "").boxes
        end = length + stored_bytes(boxes, manifest.tensors)[0]
        sums = b""
        for stored in boxes:
            tensor = manifest.tensors[stored.name]
            for panel in stored_panels(stored, tensor):
                nbytes = panel.box.numel * tensor.itemsize
                part = shard[length + panel.start :][:nbytes]
                sums += checksums(memoryview(part), block_size(nbytes))
        shard = shard[:end] + sums + shard[end + len(sums) :]
        raw["checksums"] = digest(sums)
        return json.dumps(raw, separators=(",", ":")).encode(), shard
    except (CheckpointError, KeyError, TypeError, ValueError, IndexError, RecursionError):
        return text, shard


def use(files: Files, original: Files) -> bool:
    """All that is done with a checkpoint; whether it loaded. Only our errors are caught."""
    storage = Guarded(files)
    loaded = False
    for action in (load_whole, load_rank, verify, difference, draw, clear_up):
        try:
            action(storage, original)
            loaded |= action is load_whole
        except CheckpointError:
            continue
    assert not storage.strange, f"names outside of the generation: {storage.strange}"
    return loaded


def load_whole(storage: MemoryStorage, _: Files) -> None:
    pieces = [piece for rank in layouts() for piece in rank]
    load(storage, [*{(p.name, p.box): p for p in pieces}.values(), EXTERNAL])


def load_rank(storage: MemoryStorage, _: Files) -> None:
    target = torch.zeros(7, 90, dtype=torch.float64)
    load(storage, [Piece("model/wide", target, (11, 33), (48, 400))], only=["model/wide"], cast=True)


def verify(storage: MemoryStorage, _: Files) -> None:
    for generation in scan(storage):
        if generation.manifest is not None:
            list(GenerationReader(storage, generation.manifest).verify())


def difference(storage: MemoryStorage, original: Files) -> None:
    sides = [scan(side)[0].manifest for side in (storage, Guarded(original))]
    if sides[0] is not None and sides[1] is not None:
        small = {n: t for n, t in sides[0].tensors.items() if t.nbytes < 2**20}  # those that a test may hold
        if len(small) == len(sides[0].tensors):
            list(compare(GenerationReader(storage, sides[0]), GenerationReader(Guarded(original), sides[1])))


def draw(storage: MemoryStorage, _: Files) -> None:
    for generation in scan(storage):
        if (manifest := generation.manifest) is not None:
            render_tree(manifest.tensors, {name: t.writers or () for name, t in manifest.tensors.items()})
            json.dumps(asdict(manifest))


def clear_up(storage: MemoryStorage, _: Files) -> None:
    clear_leftovers(storage)
    prune(storage, Keep(1))


@contextmanager
def bounded() -> Iterator[None]:
    """An alarm for a case that hangs, and a limit for one that takes memory without end."""

    def expired(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"a case took over {CASE_S} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, expired)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


class Found(Exception):
    """A case that raised what it must not; the message says which, to be run again by its seed."""


def campaign(seconds: float, seed: int, most: int | None = None) -> dict[str, int]:
    """Cases until the time is over (or `most`): how many, and how many of them still loaded. Raises `Found`."""
    original = valid()
    assert use(original, original), "the unchanged checkpoint does not load"
    counts = {"cases": 0, "loaded": 0}
    deadline = time.monotonic() + seconds
    with bounded():
        while time.monotonic() < deadline and counts["cases"] != most:
            rng = random.Random(f"{seed} {counts['cases']}")
            signal.alarm(CASE_S)
            try:
                counts["loaded"] += use(changed(original, rng), original)
            except Exception as error:
                raise Found(f"case {counts['cases']} of seed {seed}: {error!r}") from error
            finally:
                signal.alarm(0)
            counts["cases"] += 1
    return counts


@contextmanager
def planted() -> Iterator[None]:
    """Without the bound on whole numbers, an index may name a tensor that is not there."""
    original = codec._whole
    codec._whole = lambda value, below=0: original(value)
    try:
        yield
    finally:
        codec._whole = original


def covered(action: Callable[[], Any]) -> float:
    """The share of the parser's lines that run while `action` does."""
    lines: set[int] = set()
    path = codec.__file__

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != path:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    wanted = lines_of_functions(compile(Path(path).read_text(), path, "exec"))
    return len(lines & wanted) / len(wanted)


def lines_of_functions(code: CodeType) -> set[int]:
    """The lines that run when functions are called: those of the module itself ran when it was imported."""
    found: set[int] = set()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= {line for _, _, line in inner.co_lines() if line and line != inner.co_firstlineno}
            found |= lines_of_functions(inner)
    return found


QUICK = {"seconds": 20.0}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="another one tries other cases (default 0)")
    parser.add_argument("--plant", action="store_true", help="take out a check, and expect to find that")
    arguments = options_of(parser, QUICK)
    torch.set_num_threads(1)
    logging.getLogger("checkpointing").setLevel(logging.ERROR)  # every case would be reported as damaged
    if arguments.plant:
        try:
            with planted():
                campaign(arguments.seconds, arguments.seed)
        except Found as found:
            print(f"found what was planted: {found}")
            return 0
        print("what was planted was not found")
        return 1
    part = covered(lambda: campaign(arguments.seconds / 4, arguments.seed))
    counts = campaign(arguments.seconds * 3 / 4, arguments.seed + 1)
    rows = [
        absolute("share of the parser's lines that ran", "", part, better="higher", bar=0.95),
        absolute("hostile checkpoints without a crash", "", counts["cases"], better="higher", bar=1),
        absolute("of them still loaded", "", counts["loaded"], better="higher", bar=1),
    ]
    return finish("fuzz", rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
