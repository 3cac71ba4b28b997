"""All benchmarks, one after another, and one table of the bars that are missed.

    python -m benchmarks [--json] [--quick] [--only NAME ...]

Each runs as `python -m benchmarks.NAME --json` in a process of its own, and is ended after LIMIT_S, or QUICK_LIMIT_S.
With --json, one object of every one's rows. The exit status is 1 where a bar is missed or a benchmark did not finish.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import machine
from tests.harness.processes import kill_tree

NAMES = [
    *("main_job", "overhead", "engines", "matrix", "checkpoint", "universal", "planning", "reads", "resident", "scale"),
    *("memory", "kills", "lease", "crash", "storage_faults", "fuzz", "methods", "reselections", "tuning"),
    *("daily", "peer_defects", "hostile"),
]
LIMIT_S, QUICK_LIMIT_S = 900.0, 60.0


@dataclass
class Outcome:
    """What became of one benchmark; `why` says why it did not finish."""

    benchmark: str
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""

    @property
    def missed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("ok") is False]


def run(name: str, *, quick: bool, limit_s: float) -> Outcome:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *(["--quick"] if quick else [])]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):  # somebody else may hold its pipes
            process.communicate(timeout=10)
        return Outcome(name, limit_s, why=f"it was ended after its {limit_s:.0f} s")
    seconds = time.monotonic() - began
    try:
        rows: list[dict[str, Any]] = json.loads(output)["rows"]
    except (ValueError, KeyError, TypeError):
        said = errors.decode(errors="replace").strip().splitlines() or ["nothing"]
        return Outcome(name, seconds, why=f"it printed no report, status {process.returncode}: {said[-1]}")
    found = Outcome(name, seconds, rows)
    if process.returncode != int(bool(found.missed)) or not rows:
        found.why = f"it ended with status {process.returncode} and {len(rows)} rows"
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """The bars missed, and what did not finish."""
    lines = [f"{len(outcomes)} benchmarks in {sum(outcome.seconds for outcome in outcomes):.0f} s on {machine()}"]
    for outcome in outcomes:
        judged = sum(row.get("ok") is not None for row in outcome.rows)
        verdict = outcome.why or f"{judged - len(outcome.missed)} of {judged} bars reached"
        lines.append(f"  {outcome.benchmark:13} {outcome.seconds:6.0f} s  {verdict}")
    missed = [(outcome.benchmark, row) for outcome in outcomes for row in outcome.missed]
    lines.append("missed:" if missed else "no bar is missed")
    for name, row in missed:
        figure = row["ratio"] if row["ratio"] is not None else row["ours"]
        lines.append(f"  {name}: {row['name']}: {figure:.3g}, bar {row['bar']} {row['better']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="a short run of each, judged by nothing")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="which (default all)")
    arguments = parser.parse_args(argv)
    outcomes = []
    for name in arguments.only:
        outcomes.append(run(name, quick=arguments.quick, limit_s=QUICK_LIMIT_S if arguments.quick else LIMIT_S))
        print(f"{name}: {outcomes[-1].why or 'finished'} in {outcomes[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    print(table(outcomes), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"machine": machine(), "benchmarks": [asdict(outcome) for outcome in outcomes]}))
    return int(any(outcome.why or outcome.missed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
