"""Storage that fails under a run: every kind of call of trainer, keeper and launcher, with every error, and stalls.

    python -m benchmarks.storage_faults [--cells N] [--all] [--seed N] [--stalls S ...] [--only TEXT] [--json]

Small runs are recorded: one with snapshots in memory, one without, one that is resumed, one under the launcher. Then,
for each kind of call that they make on their files, a run is tried in which that call fails: once, or from then on for
good. A run that ended is started again on a storage that works. At the end everything is compared with the undisturbed
run: the lines of metrics, the bits of the final state, what was reported durable, and what is left behind.
By default `--cells` of them are drawn, and each kind of call is stalled only where a stall was drawn for it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.kills import final_state
from benchmarks.report import absolute, finish, options_of
from checkpointing import CheckpointError
from checkpointing.generations import candidates, scan
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage
from tests.harness.faulty import READS, Call, Fault, environment, recorded
from tests.harness.forks import Fork, Server
from tests.harness.processes import ROOT, kill_tree, wait_for
from tests.harness.runs import SMALL, rows
from trainer.track.files import SPARE

STEPS, RESUMED_AT = 9, 6
SETTINGS = [
    *SMALL,
    "run.name=run",
    "data.log_ids=true",
    "checkpoint.every=3",
    "checkpoint.keep=1",
    "eval.every=4",
    "schedule=constant",  # so that a run of six steps, continued to nine, is one of nine
    "schedule.warmup_steps=2",
]
MEMORY = ["checkpoint.memory.every=1", "checkpoint.memory.keep_s=20"]
NO_MEMORY = ["checkpoint.memory.every=0"]
KINDS = {"memory": MEMORY, "disk": NO_MEMORY, "resumed": NO_MEMORY, "launched": MEMORY}
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "ESTALE", "EROFS")
OF_READS = ("EIO", "ESTALE")  # the others are of writes
TRIED_AGAIN = ("read", "preadv", "scandir", "listdir")
DELETIONS = ("unlink", "rmdir", "rename")
WAIT_S = 120.0
GENERATION = re.compile(r"step-\d+-[0-9a-f]+")


@dataclass(frozen=True)
class Cell:
    """One run that is tried."""

    kind: str  # of KINDS
    fault: Fault

    def __str__(self) -> str:
        fault = self.fault
        what = (
            f"a stall of {fault.stall_s:g} s"
            if fault.stall_s
            else f"{fault.error} {'once' if fault.times else 'for good'}"
        )
        return f"{self.kind} run, {fault.call}: {what}"


@dataclass
class Tried:
    """What came of it. `wrong` names each promise that was broken."""

    cell: Cell
    hits: int = 0
    statuses: list[int] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)  # a column of the table, and what was seen


COLUMNS = {
    "traceback": "tracebacks",
    "lost": "reported durable that do not load",
    "abandoned": "sound generations abandoned",
    "status": "wrong statuses",
    "rows": "rows of metrics lost, doubled or changed",
    "state": "final states that differ",
    "left": "processes or memory left behind",
}


class Campaign:
    """Runs below one directory, each with memory of its own."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self._numbers = itertools.count()
        self.rows: list[dict[str, Any]] = []
        self.state: dict[str, torch.Tensor] = {}

    def record(self, kinds: Iterable[str]) -> dict[str, dict[Call, int]]:
        """What undisturbed runs call, and how often; the first is what all others are compared with."""
        found = {}
        for kind in kinds:
            with self._place() as place:
                self._prepare(kind, place)
                status, said = place.run(kind, None)
                if status:
                    raise RuntimeError(f"the undisturbed {kind} run ended with {status}:\n{said[-3000:]}")
                place.wait_until_clear()
                found[kind] = recorded(str(place.record))[0]
                if not self.rows:
                    self.rows, self.state = _comparable(place.run_dir), final_state(place.checkpoints)
                elif wrong := self._differences(place):
                    raise RuntimeError(f"undisturbed runs differ: {wrong}")
        return found

    def run(self, cell: Cell) -> Tried:
        tried = Tried(cell)
        with self._place() as place:
            self._prepare(cell.kind, place)
            before = _durable(place.run_dir)
            status, said = place.run(cell.kind, cell.fault)
            tried.hits = recorded(str(place.record))[1]
            tried.statuses.append(status)
            reported = before | _durable(place.run_dir)
            tried.wrong += _wrong_end(cell, status, said) + _wrong_generations(place, reported)
            if status:
                newest = max(map(_step, reported), default=0)
                status, more = place.run(cell.kind, None)
                tried.statuses.append(status)
                if status:
                    tried.wrong.append(("status", f"started again, it ended with {status}: {more.strip()[-300:]}"))
                elif (at := _resumed_at(place.run_dir)) < newest:
                    tried.wrong.append(("abandoned", f"it went on from step {at}, and step {newest} was durable"))
                tried.wrong += _wrong_generations(place, reported | _durable(place.run_dir))
            if not tried.wrong:
                tried.wrong += self._differences(place)
            fault = cell.fault
            forgotten = fault.call.name in DELETIONS or ".gone-" in fault.call.file
            undeletable = fault.call.file.startswith("memory") and not fault.times and forgotten
            if not undeletable and (left := place.wait_until_clear()):
                tried.wrong.append(("left", left))
        return tried

    def _differences(self, place: Place) -> list[tuple[str, str]]:
        found = []
        if (mine := _comparable(place.run_dir)) != self.rows:
            steps = [row["step"] for row in mine]
            found.append(("rows", f"lines of steps {steps}, or their values, are not the undisturbed run's"))
        state = final_state(place.checkpoints)
        if unequal := [n for n, tensor in self.state.items() if n not in state or not torch.equal(state[n], tensor)]:
            found.append(("state", f"{len(unequal)} tensors, such as {unequal[0]}"))
        return found

    def _prepare(self, kind: str, place: Place) -> None:
        if kind == "resumed":  # the start that is tried finds something
            status, said = place.run(kind, None, f"train.steps={RESUMED_AT}")
            if status:
                raise RuntimeError(f"it could not be prepared ({status}):\n{said[-3000:]}")
            place.record.unlink()

    @contextmanager
    def _place(self) -> Iterator[Place]:
        place = Place(self.top / str(next(self._numbers)))
        try:
            yield place
        finally:
            place.clear()


class Place:
    """Where one run lives."""

    def __init__(self, top: Path) -> None:
        top.mkdir()
        self.top, self.run_dir, self.record = top, top / "run", top / "calls"
        self.checkpoints = self.run_dir / "checkpoints"
        self.memory = Path(tempfile.mkdtemp(prefix="storage-faults-", dir="/dev/shm"))

    def run(self, kind: str, fault: Fault | None, *more: str) -> tuple[int, str]:
        """Its status, and what it said."""
        words = [f"run.dir={self.run_dir}", *SETTINGS, *KINDS[kind], f"checkpoint.memory.dir={self.memory}"]
        words += more or [f"train.steps={STEPS}"]
        variables = environment({"run": str(self.run_dir), "memory": str(self.memory)}, str(self.record), fault)
        limit = WAIT_S + (4 * fault.stall_s + 120 * (not fault.times) if fault is not None else 0)
        if kind == "launched":
            popen, command = subprocess.Popen, ["-m", "launch", "local", "--nproc", "1", "--", *words]
        else:
            popen, command = Fork, ["-m", "tests.harness.faulty", "trainer", *words]
        with open(self.top / "said", "ab") as said:
            start = said.tell()
            process = popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = 124
            finally:
                kill_tree(process.pid)
                process.wait(30)
        return status, (self.top / "said").read_bytes()[start:].decode(errors="replace")

    def wait_until_clear(self, seconds: float = 60.0) -> str:
        """What there still is of this run's memory, after its keeper had time to delete it."""
        try:
            wait_for(lambda: not any(self.memory.iterdir()), seconds)
        except AssertionError:
            return f"in memory: {sorted(path.name for path in self.memory.iterdir())}"
        return ""

    def clear(self) -> None:
        shutil.rmtree(self.memory, ignore_errors=True)  # a keeper whose directory is gone ends
        shutil.rmtree(self.top, ignore_errors=True)


def _comparable(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics, with those that wait beside the checkpoints for a file that could not be written."""
    lines = {row["step"]: row for row in [*rows(run_dir, f"checkpoints/{SPARE}"), *rows(run_dir)]}
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "sample_ids")} for _, row in sorted(lines.items())]


def _durable(run_dir: Path) -> set[str]:
    """Generations that were reported as durable."""
    commits = [event for event in rows(run_dir, "events.jsonl") if event.get("tier") == "durable"]
    return {event["generation"] for event in commits if "generation" in event}


def _step(generation: str) -> int:
    return int(generation.split("-")[1])


def _resumed_at(run_dir: Path) -> int:
    return max((int(e["step"]) for e in rows(run_dir, "events.jsonl") if e["event"] == "resume"), default=0)


def _wrong_end(cell: Cell, status: int, said: str) -> list[tuple[str, str]]:
    """Training goes on past what fails once; what fails for good may end it, with one sentence and status 1.

    A start may be refused (2) by what somebody has to mend, such as a full disk.
    """
    wrong = []
    if "Traceback" in said:
        wrong.append(("traceback", said[said.index("Traceback") :][-2500:]))
    fault = cell.fault
    in_memory = fault.call.file.startswith("memory")
    survivable = fault.stall_s or (fault.times and (fault.call.phase != "start" or fault.call.name in TRIED_AGAIN))
    refusable = in_memory if fault.error in OF_READS or fault.call.phase != "start" else True
    if status not in ((0,) if survivable else (0, 1, 2) if refusable else (0, 1)):
        wrong.append(("status", f"it ended with {status}: {said.strip()[-400:]}"))
    return wrong


def _wrong_generations(place: Place, reported: set[str]) -> list[tuple[str, str]]:
    """What was reported durable is there and sound, unless a newer one took its place; nothing sound is abandoned."""
    wrong = []
    storage = FileStorage(place.checkpoints)
    there = {generation.name: generation for generation in scan(storage)}
    kept = candidates(storage)
    newest = max((generation.step for generation in kept), default=-1)
    for name in reported:
        if name not in there and _step(name) > newest:
            wrong.append(("lost", f"{name} was reported durable, and is not there"))
    for generation in kept:
        try:
            damage = [e for _, _, e in GenerationReader(storage, generation.manifest).verify() if e is not None]  # type: ignore[arg-type]
        except CheckpointError as error:
            damage = [error]
        if damage:
            wrong.append(("lost", f"{generation.name} is committed, and damaged: {damage[0]}"))
    for name in reported & there.keys():
        if there[name].abandoned:
            wrong.append(("abandoned", f"{name} was durable, and is abandoned"))
    return wrong


def cells_of(calls: dict[str, dict[Call, int]], rng: random.Random) -> list[Cell]:
    """Every kind of call with every error that it may give, once and for good, at one of the times that it is made."""
    found = []
    seen = set[Call]()
    for kind, counts in calls.items():
        for call, count in sorted(counts.items()):
            if call in seen or (kind == "launched") != (call.role == "launcher"):
                continue
            seen.add(call)
            for error in OF_READS if call.name in READS else ERRORS:
                for times in (1, 0):
                    found.append(Cell(kind, Fault(call, error, times=times, after=rng.randrange(count))))
    return found


def stalls_of(cells: Sequence[Cell], seconds: Sequence[float], rng: random.Random) -> list[Cell]:
    """One call of each kind that takes so long."""
    each = {(cell.kind, cell.fault.call): cell for cell in cells}
    return [
        Cell(kind, Fault(call, stall_s=stall, times=1, after=rng.randrange(cell.fault.after + 1)))
        for (kind, call), cell in each.items()
        for stall in seconds
        if not call.file.startswith("memory")  # a tmpfs does not stall
    ]


def try_all(campaign: Campaign, cells: Sequence[Cell], workers: int) -> list[Tried]:
    """All of them, several at a time; what is wrong is printed as it comes."""

    def one(cell: Cell) -> Tried:
        tried = campaign.run(cell)
        for column, what in tried.wrong:
            print(f"{cell}\n    {column}: {what}", file=sys.stderr, flush=True)
        return tried

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, cells))


QUICK = {"cells": 6, "stalls": [3.0], "drawn_stalls": 1}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage_faults", description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=150, help="errors that are drawn (default 150)")
    parser.add_argument("--drawn-stalls", type=int, default=16, help="stalls that are drawn (default 16)")
    parser.add_argument(
        "--stalls", type=float, nargs="*", default=[45.0, 120.0], metavar="S", help="seconds of a stall"
    )
    parser.add_argument("--all", action="store_true", help="every error and every stall: hours")
    parser.add_argument("--only", default="", metavar="TEXT", help="of what contains it, as it is printed")
    parser.add_argument("--seed", type=int, default=0)
    options = options_of(parser, QUICK)
    rng = random.Random(options.seed)
    server = Server()
    try:
        with tempfile.TemporaryDirectory() as top:
            campaign = Campaign(Path(top))
            began = time.monotonic()
            calls = campaign.record(KINDS)
            errors = [cell for cell in cells_of(calls, rng) if options.only in str(cell)]
            stalls = stalls_of(errors, options.stalls, rng)
            if not options.all:
                errors = rng.sample(errors, min(options.cells, len(errors)))
                stalls = rng.sample(stalls, min(options.drawn_stalls, len(stalls)))
            print(
                f"{sum(map(len, calls.values()))} kinds of calls; {len(errors)} errors, {len(stalls)} stalls",
                file=sys.stderr,
            )
            tried = try_all(campaign, errors, 2) + try_all(campaign, stalls, 16)
            print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    finally:
        server.stop()
    full = not options.only and len(tried) >= 100
    wrong = Counter(column for one in tried for column, _ in one.wrong)
    met = sum(bool(one.hits) for one in tried)
    ended = sum(one.statuses[0] != 0 for one in tried)
    print(f"{ended} of {len(tried)} runs ended with an error and were started again", file=sys.stderr)
    table = [
        absolute(
            "kinds of calls on files", "", len({c for one in calls.values() for c in one}), better="higher", bar=200
        ),
        absolute("runs in which the fault was met", "", met, better="higher", bar=0.9 * len(tried), full=full),
        *(absolute(what, "", wrong[column], better="lower", bar=0) for column, what in COLUMNS.items()),
    ]
    return finish("storage_faults", table, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
