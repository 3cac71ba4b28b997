"""Tokenized records on the disk, mapped into memory: made once, by all cores, and gone on with after an interruption.

A directory for each content: its name is a hash of the records, of the tokenizer and of what cuts them. It holds parts
while it is made, and arrays when it is done; a process that finds another one making it waits for that.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.data.dataset import Joined, Sample
from trainer.data.records import RecordReader
from trainer.errors import Refused

logger = logging.getLogger(__name__)

PART = 2000  # records
VERSION = 2  # of the files, and of what is made of a record: one more with every change of either
DONE = "done.json"
SIDES = ("train", "held_out")
# Where a record stands, the record, and whether it is held out.
Row = tuple[str, Any, bool]


@dataclass(frozen=True)
class Tokenized:
    train: Joined
    held_out: Joined
    tally: Counter[str]


def tokenized(
    directory: Path, key: str, rows: Callable[[], Iterable[Row]], count: int, reader: RecordReader, workers: int
) -> Tokenized:
    """The samples of `count` records, in their order, from the cache or into it, by `workers` processes (0: all cores).

    `key` tells their content, the tokenizer and all options that the samples follow from. `Refused` for a record that
    is malformed, or a directory that cannot be written; what was made before stays.
    """
    place = directory / f"{key}-{VERSION}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place):
            workers = workers or len(os.sched_getaffinity(0))
            if not (place / DONE).is_file():
                _make(place, rows(), count, reader, workers)
            try:
                return _mapped(place)
            except (ValueError, EOFError, KeyError, TypeError, FileNotFoundError) as error:
                logger.warning("%s is damaged (%s), and is made anew", place, error)
                (place / DONE).unlink()
                _make(place, rows(), count, reader, workers)
                return _mapped(place)
    except OSError as error:
        raise Refused(
            f"data.cache={directory} cannot be used: {error.strerror or error}. Type data.cache=DIRECTORY with one "
            "that can be written, or data.cache=null to tokenize in memory."
        ) from error


def tokenize(reader: RecordReader, rows: Iterable[Row]) -> tuple[list[Sample], list[Sample]]:
    """Tokenize rows: samples to train on, and held-out ones."""
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for where, record, held_out in rows:
        sides[held_out].extend(reader.samples(where, record))
    return sides


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process of this machine at a time; the system lets go of the lock of one that dies."""
    with open(place / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that tokenizes into %s", place)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(place: Path, rows: Iterable[Row], count: int, reader: RecordReader, workers: int) -> None:
    parts = -(-count // PART)
    for path in place.glob("part-*.npz"):  # of a run that was interrupted, perhaps by the end of its machine
        if not _is_sound(path):
            path.unlink(missing_ok=True)
    workers = max(1, min(workers, parts))
    # In processes of their own, for Python tokenizes one text at a time; spawned, for this one has threads of torch.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (reader,)) if workers > 1 else None
    if pool is None:
        global _reader
        _reader = reader
    with _shown(f"tokenizing into {place}", count) as advance:
        try:
            waiting: list[tuple[int, Future[None]]] = []
            iterator = iter(rows)
            for number in range(parts):
                part = list(islice(iterator, PART))
                if _part(place, number).is_file():
                    advance(len(part))
                elif pool is None:
                    _work(place, number, part)
                    advance(len(part))
                else:
                    waiting.append((len(part), pool.submit(_work, place, number, part)))
                    while len(waiting) > 2 * workers:  # no more of the records in memory than are worked on
                        size, future = waiting.pop(0)
                        future.result()
                        advance(size)
            for size, future in waiting:
                future.result()
                advance(size)
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
    _join(place, parts)


_reader: RecordReader  # of this process


def _begin(reader: RecordReader) -> None:
    global _reader
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs in parallel
    _reader = reader


def _is_sound(path: Path) -> bool:
    """An archive has checksums, which reading compares."""
    try:
        with np.load(path) as part:
            return all(part[name] is not None for name in part.files) and "tally" in part.files
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False


def _part(place: Path, number: int) -> Path:
    return place / f"part-{number:06d}.npz"


def _work(place: Path, number: int, rows: Sequence[Row]) -> None:
    """One part, whole or not there."""
    _reader.tally.clear()
    arrays: dict[str, Any] = {}
    for side, samples in zip(SIDES, tokenize(_reader, rows), strict=True):
        arrays |= {f"{side}-{name}": array for name, array in Joined.of(samples)._asdict().items()}
    draft = _part(place, number).with_suffix(f".{uuid.uuid4().hex[:8]}")
    with open(draft, "wb") as file:
        np.savez(file, tally=np.frombuffer(json.dumps(_reader.tally).encode(), np.uint8), **arrays)
    draft.replace(_part(place, number))


def _join(place: Path, parts: int) -> None:
    """The parts as arrays that can be mapped, and DONE when they are whole."""
    tally: Counter[str] = Counter()
    hashes: dict[str, str] = {}
    files = [_part(place, number) for number in range(parts)]
    for side in SIDES:
        sizes = []
        for path in files:
            with np.load(path) as part:
                tokens, ends = part[f"{side}-tokens"], part[f"{side}-ends"]
                sizes.append((len(tokens), len(ends), tokens.dtype if len(tokens) else None))
        dtype = next((kind for _, _, kind in sizes if kind is not None), np.dtype(np.int32))
        total, samples = sum(size for size, _, _ in sizes), sum(size for _, size, _ in sizes)
        drafts = {name: place / f"{side}-{name}.{uuid.uuid4().hex[:8]}" for name in Joined._fields}
        made = {
            name: np.lib.format.open_memmap(drafts[name], "w+", kind, (length,))
            for name, kind, length in (
                ("tokens", dtype, total),
                ("targets", np.bool_, total),
                ("ends", np.int64, samples),
            )
        }
        at = index = 0
        for path, (size, many, _) in zip(files, sizes, strict=True):
            with np.load(path) as part:
                made["tokens"][at : at + size] = part[f"{side}-tokens"]
                made["targets"][at : at + size] = part[f"{side}-targets"]
                made["ends"][index : index + many] = part[f"{side}-ends"] + at
                if side == SIDES[0]:
                    tally.update(json.loads(bytes(part["tally"])))
            at, index = at + size, index + many
        for name, array in made.items():
            array.flush()
            hashes[f"{side}-{name}"] = _hash(array)
            drafts[name].replace(place / f"{side}-{name}.npy")
    draft = place / f"{DONE}.{uuid.uuid4().hex[:8]}"
    draft.write_text(json.dumps({"tally": tally, "hashes": hashes}), encoding="utf-8")
    draft.replace(place / DONE)
    for path in files:
        path.unlink(missing_ok=True)


def _mapped(place: Path) -> Tokenized:
    told = json.loads((place / DONE).read_text(encoding="utf-8"))
    hashes = told["hashes"]

    def side(name: str) -> Joined:
        return Joined(
            *(_read(place / f"{key}.npy", hashes[key]) for key in (f"{name}-{one}" for one in Joined._fields))
        )

    return Tokenized(side("train"), side("held_out"), Counter(told["tally"]))


def _read(path: Path, expected: str) -> Any:
    try:
        array = np.load(path, mmap_mode="r")
    except ValueError:  # of no elements there is nothing to map
        array = np.load(path)
    if _hash(array) != expected:
        raise ValueError(f"{path.name} does not hold what was written")
    return array


def _hash(array: Any) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).data)


@contextmanager
def _shown(what: str, count: int) -> Iterator[Any]:
    """A bar on a terminal; elsewhere a line every tenth of the way."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=count)
            yield lambda size: progress.advance(task, size)
        return
    done = said = 0

    def advance(size: int) -> None:
        nonlocal done, said
        done += size
        if count > PART and done * 10 // count > said:
            said = done * 10 // count
            print(f"{what}: {done:,} of {count:,} records", file=sys.stderr, flush=True)

    yield advance
