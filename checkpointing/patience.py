"""Waiting for other ranks for as long as they get on, rather than for a fixed time.

A rank that does something long (`working()`) says so in the store of its process group, with a number that grows as
long as it moves bytes or computes. Whoever waits for it looks there, and gives it up (`LostError`) when it has said
nothing for the group's timeout, or has moved nothing for `PATIENCE.seconds`.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.errors import LostError

logger = logging.getLogger("checkpointing")

LOOK_S = 1.0  # between one look at the others and the next
BEAT_S = 5.0  # at most, between one word of a rank that works and the next
JOIN_S = 10.0  # for a store that does not answer: the next exchange says so
WARN_S = 60.0  # without a byte, before it is said who is waited for
MOVED_BYTES = 4096  # between two words: less is what looking itself reads
WORKED_S = 0.05  # of computing between two words: less is what threads cost that only wait
KEY = "evershard/working"


@dataclass
class Patience:
    """How long a rank that is alive may move nothing, as where its storage hangs, before it is given up."""

    seconds: float = 3600.0


PATIENCE = Patience()


class Moved:
    """A number that grows while this process moves bytes or computes."""

    def __init__(self) -> None:
        self._count, self._bytes, self._computed = 0, 0, 0.0

    def now(self) -> int:
        moved, computed = _bytes_moved(), time.process_time()
        if moved - self._bytes > MOVED_BYTES or computed - self._computed > WORKED_S:
            self._count += 1
        self._bytes, self._computed = moved, computed
        return self._count


def _bytes_moved() -> int:
    """Count what this process has read, written and asked for; 0 where the kernel does not tell."""
    with suppress(OSError, ValueError), open("/proc/self/io") as file:
        told = dict(line.split(": ") for line in file.read().splitlines())
        return int(told["rchar"]) + int(told["wchar"])
    return 0


def silence_s() -> float:
    """Seconds for which a rank of the default group may say nothing: the group's own timeout."""
    try:
        return float(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return float(dist.distributed_c10d.default_pg_timeout.total_seconds())


_level = threading.local()


@contextmanager
def working() -> Iterator[None]:
    """Around what may take longer than others wait for a rank that says nothing, such as writing to a slow disk."""
    depth = getattr(_level, "depth", 0)
    if depth or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    store, key = _store(), f"{KEY}/{dist.get_rank()}"
    ended = threading.Event()
    beat_s = min(BEAT_S, silence_s() / 4)
    thread = threading.Thread(target=_beat, args=(store, key, beat_s, ended), name="working", daemon=True)
    thread.start()
    _level.depth = 1
    try:
        yield
    finally:
        _level.depth = 0
        ended.set()
        thread.join(JOIN_S)


def _beat(store: Any, key: str, beat_s: float, ended: threading.Event) -> None:
    progress, said = Moved(), False
    with suppress(Exception):  # the others see that nothing is said any more
        while not ended.wait(beat_s):
            store.set(key, f"{progress.now()} {time.time():.3f}")
            said = True
        if said:
            store.set(key, "")  # not deleted: whoever has seen the key and asks for it would wait for it


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


@dataclass
class _Other:
    """The last word of a rank that works, and when it was new."""

    word: str = ""
    heard: float = 0.0
    moved: float = 0.0


class Wait:
    """One wait of this rank for others of a world of `size`; `look()` raises where one of them is to be given up."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._others: dict[int, _Other] = {}
        self._alone = time.monotonic()  # since when nobody has said anything
        self._warned = False

    def look(self) -> None:
        try:
            said = _working(self._size)
        except Exception as error:  # its server went with the rank that ran it
            raise LostError(f"rank {self._rank} cannot reach the others: {error}") from error
        now = time.monotonic()
        if said.keys() != self._others.keys():
            self._alone = now
        others = {rank: self._others.get(rank) or _Other(heard=now, moved=now) for rank in said}
        for rank, other in others.items():
            if said[rank] != other.word:
                other.heard = now
            if _count(said[rank]) != _count(other.word):
                other.moved, self._warned = now, False
            other.word = said[rank]
        self._others = others
        limit = silence_s()
        if not others and now - self._alone > limit:
            raise LostError(f"rank {self._rank} has heard nothing of the others for {limit:.0f} s")
        for rank, other in sorted(others.items()):
            if now - other.heard > limit:
                raise LostError(f"rank {self._rank} has heard nothing of rank {rank} for {limit:.0f} s")
            if now - other.moved > PATIENCE.seconds:
                raise LostError(f"rank {rank} moved nothing for {now - other.moved:.0f} s: its storage hangs")
        self._warn(now)

    def _warn(self, now: float) -> None:
        """Once, and by one rank: the first of those that wait."""
        still = {rank: now - other.moved for rank, other in self._others.items() if now - other.moved > WARN_S}
        if still and not self._warned and self._rank == min(set(range(self._size)) - self._others.keys(), default=0):
            self._warned = True
            who = ", ".join(f"rank {rank}" for rank in sorted(still))
            logger.warning("waiting for %s, whose storage has moved nothing for %.0f s", who, min(still.values()))


def _working(size: int) -> dict[int, str]:
    store, found = _store(), dict[int, str]()
    for rank in range(size):
        key = f"{KEY}/{rank}"
        if store.check([key]) and (text := store.get(key).decode()):
            found[rank] = text
    return found


def _count(word: str) -> str:
    return word.partition(" ")[0]


def finish(work: Any, rank: int, size: int) -> None:
    """Wait until an exchange of the group of `patient_group` has ended; `LostError` where the others are given up."""
    wait: Wait | None = None
    while True:
        try:
            work.wait(timedelta(seconds=LOOK_S))
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # ended meanwhile, or with an error, such as of a connection that broke
                return
        wait = wait or Wait(rank, size)
        try:
            wait.look()
        except LostError:
            if not work.is_completed():
                raise


_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by the world that it is a group of
NEVER = timedelta(days=365)


def patient_group() -> Any:
    """A group of all ranks for exchanges without a limit of time, made when it is first asked for. Collective."""
    if (world := dist.group.WORLD) not in _groups:
        _groups[world] = dist.new_group(backend="gloo", timeout=NEVER)
    return _groups[world]
