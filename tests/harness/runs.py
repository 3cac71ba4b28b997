"""Whole runs: starting and killing them, and comparing what they recorded."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.harness.forks import Fork
from tests.harness.processes import ROOT, kill_tree, wait_for

WAIT_S = 300
# A model that trains in milliseconds, for what does not depend on the model.
SMALL = [
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "train.seq_len=16",
    "tracking=none",
    "eval.generate_tokens=0",
    "eval.samples=4",
]


def rows(run_dir: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = run_dir / file
    if not path.exists():
        return []
    # A line that is being written at this moment is not there yet.
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def events(run_dir: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["step"]) for e in rows(run_dir, "events.jsonl")]


def assert_same_run(a: list[dict[str, Any]], b: list[dict[str, Any]], last: int, tolerance: float = 1e-5) -> float:
    """Every step once, with the same samples and the same loss; returns the largest difference of a loss."""
    for run in (a, b):
        assert [row["step"] for row in run] == list(range(1, last + 1))
    assert [row["sample_ids"] for row in a] == [row["sample_ids"] for row in b]
    differences = [abs(x["loss"] - y["loss"]) for x, y in zip(a, b, strict=True)]
    worst: float = max(differences)
    assert worst <= tolerance, f"the losses of step {differences.index(worst) + 1} differ by {worst}"
    return worst


def train(overrides: list[str]) -> str:
    """Run the trainer in this process as it is placed; returns what it printed."""
    from trainer.compose import compose
    from trainer.run import run

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert run(compose(overrides)) == 0
    return output.getvalue()


def trainer(
    *arguments: str, module: str = "trainer", started: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a module of ours to its end: forked, or `started` as a person starts it, with all of its imports."""
    words = [sys.executable, "-m", module, *arguments]
    options = {"cwd": ROOT, "env": environment(), "stdin": subprocess.DEVNULL, **options}
    popen = subprocess.Popen if started else Fork
    with popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            output, errors = process.communicate(timeout=WAIT_S)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def environment(**more: str) -> dict[str, str]:
    """Threads as the launcher shares them out, rather than as the tests set them."""
    return {**{k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}, **more}


def launch(num_processes: int, overrides: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return trainer("local", "--nproc", str(num_processes), "--", *overrides, module="launch", **options)


@contextlib.contextmanager
def launched(
    num_processes: int, overrides: Sequence[str], log: Path, flags: Sequence[str] = (), *, started: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A launch in the background, forked or `started`; whatever is left of it is killed at the end."""
    words = [sys.executable, "-m", "launch", "local", "--nproc", str(num_processes), *flags, "--", *overrides]
    with open(log, "ab") as output:
        process = (subprocess.Popen if started else Fork)(
            words, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait(30)


def kill_when(run_dir: Path, num_processes: int, overrides: Sequence[str], step: int) -> int:
    """Launch, kill every process with SIGKILL once `step` is in the metrics; returns the last step recorded."""
    log = run_dir.with_suffix(".log")
    with launched(num_processes, overrides, log) as process:
        wait_for(lambda: process.poll() is not None or any(r["step"] >= step for r in rows(run_dir)))
        assert process.poll() is None, f"it ended before step {step}:\n{log.read_text()}"
        kill_tree(process.pid)
    return int(rows(run_dir)[-1]["step"])
