"""Crash consistency: after a kill or a power loss at any system call, what was before or what is meant to be.

    python -m benchmarks.crash [--json] [--ranks N] [--samples N] [--seed N] [--break sync|order]

Ranks that save a second generation are recorded by strace. For every prefix of their merged operations, the states that
a crash there may leave are built by `crash_model` and given to the real `load`. Two controls, wrong on purpose, must be
found out: a save that syncs nothing, and one that writes COMMIT before shards. `--break` runs only that control.
Then the same of what else a run does to its files (`crash_actions`), each with its control that syncs nothing.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from benchmarks.crash_actions import ACTIONS, action, record_actions
from benchmarks.crash_actions import Judge as ActionJudge
from benchmarks.crash_model import History, crash_states
from benchmarks.crash_ranks import (
    COMMIT_FIRST,
    NEW,
    OLD,
    SOUND,
    WITHOUT_SYNC,
    Recording,
    objects,
    pieces,
    record,
    state,
    why_no_strace,
)
from benchmarks.report import Row, absolute, finish, options_of
from checkpointing import load
from checkpointing.generations import candidates
from checkpointing.stores import MemoryStorage
from checkpointing.tensors import tensor_bytes

CASES = {SOUND: "save", WITHOUT_SYNC: "control without syncs", COMMIT_FIRST: "control with COMMIT before shards"}


@dataclass(frozen=True)
class Result:
    """What a campaign looked at, and what broke the promise."""

    num_operations: int
    num_prefixes: int
    num_states: int  # built
    outcomes: dict[str, int]  # of the distinct ones
    violations: tuple[str, ...]  # one for each prefix and way in which a wrong state came about

    @property
    def num_distinct(self) -> int:
        return sum(self.outcomes.values())


class Judge:
    """Loads states as a run would that starts again, each distinct one once."""

    def __init__(self) -> None:
        self._expected = {"old": (state(OLD), objects(OLD)), "new": (state(NEW), objects(NEW))}
        self._known: dict[bytes, str] = {}

    @property
    def outcomes(self) -> dict[str, int]:
        return dict(Counter(self._known.values()))

    def outcome(self, listing: dict[str, bytes]) -> str:
        """`old` or `new`, or else what is wrong."""
        hasher = xxhash.xxh3_128()
        for name, data in sorted(listing.items()):
            hasher.update(f"{len(name)} {name} {len(data)} ".encode())
            hasher.update(data)
        key = hasher.digest()
        if key not in self._known:
            self._known[key] = self._load(listing)
        return self._known[key]

    def _load(self, listing: dict[str, bytes]) -> str:
        storage = MemoryStorage()
        for name, data in listing.items():
            if not name.endswith("/"):
                storage.put(name, [data])
        target = {name: torch.zeros_like(tensor) for name, tensor in state(OLD).items()}
        try:
            found = load(storage, pieces(target, 0, 1))
        except Exception as error:  # whatever a user would see instead of a checkpoint
            return f"{type(error).__name__}: {error}"
        for outcome, (tensors, expected) in self._expected.items():
            if found == expected and all(_same_bits(target[name], tensor) for name, tensor in tensors.items()):
                # What was passed over on the way must not have claimed to be a generation.
                committed = [g for g in candidates(storage) if g.step == NEW]
                return "half of the new one is committed" if outcome == "old" and committed else outcome
        return "a mixture of both"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and tensor_bytes(a) == tensor_bytes(b)


def campaign(
    recording: Recording,
    samples: int,
    seed: int = 0,
    judge: Judge | ActionJudge | None = None,
) -> Result:
    """Crash after every prefix of a recording, and judge all that may be left."""
    history = History(recording.start, recording.operations)
    if (replayed := history.end.listing()) != (found := recording.end.listing()):
        wrong = sorted(name for name in replayed.keys() | found.keys() if replayed.get(name) != found.get(name))
        raise ValueError(f"the recording is not all that happened; after its replay these differ: {wrong}")
    returned = [at for at, operation in enumerate(history.operations) if operation.kind == "returned"]
    if len(returned) != recording.num_ranks:
        raise ValueError(f"save returned on {len(returned)} of {recording.num_ranks} ranks")
    judge, rng = judge or Judge(), random.Random(seed)
    num_states = 0
    violations = []
    with _quiet():
        for length in range(len(history.operations) + 1):
            for how, disk in crash_states(history, length, samples, rng):
                num_states += 1
                outcome = judge.outcome(disk.listing())
                if outcome not in (("new",) if length > returned[0] else ("old", "new")):
                    last = history.operations[length - 1] if length else "nothing"
                    violations.append(f"after {length} operations, the last {last}; {how}: {outcome}")
    return Result(len(history.operations), length + 1, num_states, judge.outcomes, tuple(violations))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about generations that are passed over: the judge counts them."""
    logger = logging.getLogger("checkpointing")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def rows(case: str, num_ranks: int, result: Result, *, full: bool = True) -> list[Row]:
    what = f"{CASES[case]}, {num_ranks} rank{'s' * (num_ranks > 1)}"
    if case != SOUND:
        return [absolute(f"violations found, {what}", "", len(result.violations), better="higher", bar=1)]
    return [
        absolute(f"operations recorded, {what}", "", result.num_operations, better="higher", bar=5 * num_ranks),
        absolute(f"prefixes replayed, {what}", "", result.num_prefixes, better="higher", bar=result.num_operations + 1),
        absolute(
            f"distinct states loaded, {what}",
            "",
            result.num_distinct,
            better="higher",
            bar=result.num_prefixes,
            full=full,
        ),
        absolute(f"violations, {what}", "", len(result.violations), better="lower", bar=0),
    ]


def run(num_ranks: int, cases: Sequence[str], samples: int, seed: int) -> dict[str, Result]:
    with tempfile.TemporaryDirectory() as directory:
        recordings = record(Path(directory), num_ranks, cases)
        return {case: campaign(recording, samples, seed) for case, recording in recordings.items()}


def run_actions(samples: int, seed: int) -> dict[str, Result]:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory).resolve()
        cases = [case for name in ACTIONS for case in (name, f"{name}.{WITHOUT_SYNC}")]
        recordings = record_actions(top, cases)
        return {
            case: campaign(recording, samples, seed, ActionJudge(action(top, case)))
            for case, recording in recordings.items()
        }


def rows_of_actions(results: dict[str, Result]) -> list[Row]:
    ours = {case: result for case, result in results.items() if case in ACTIONS}
    missed = [case for case, result in results.items() if case not in ACTIONS and not result.violations]
    found = [
        absolute(f"violations, {case}", "", len(result.violations), better="lower", bar=0)
        for case, result in ours.items()
    ]
    distinct = sum(result.num_distinct for result in ours.values())
    return [
        absolute("distinct states judged, of what else a run does", "", distinct, better="higher", bar=10 * len(ours)),
        *found,
        absolute("of these, without syncs and not found out", "", len(missed), better="lower", bar=0),
    ]


QUICK = {"samples": 2}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument("--samples", type=int, default=32, help="partial losses sampled for each prefix (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of those samples (default 0)")
    parser.add_argument("--break", dest="broken", choices=[WITHOUT_SYNC, COMMIT_FIRST], help="only this control")
    arguments = options_of(parser, QUICK)
    if arguments.ranks < 1 or arguments.samples < 0:
        parser.error("--ranks is 1 or more, --samples 0 or more")
    if why := why_no_strace():
        parser.error(f"{why}; tests/benchmarks/test_crash.py replays saves that are recorded without it")
    cases = [arguments.broken] if arguments.broken else list(CASES)
    results = run(arguments.ranks, cases, arguments.samples, arguments.seed)
    for case, result in results.items():
        print(f"{CASES[case]}: {result.num_states} states built; {result.outcomes}", file=sys.stderr)
        for violation in result.violations[:5]:
            print(f"  {violation}", file=sys.stderr)
    others = {} if arguments.broken else run_actions(arguments.samples, arguments.seed)
    for case, result in others.items():
        print(f"{case}: {result.num_states} states built; {result.outcomes}", file=sys.stderr)
    full = arguments.samples >= 8  # fewer may make fewer states than there are prefixes
    table = [row for case, result in results.items() for row in rows(case, arguments.ranks, result, full=full)]
    table += rows_of_actions(others) if others else []
    return finish("crash", table, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
