"""Runs that select entries anew, killed and resumed under other layouts, against the same run undisturbed.

    python -m benchmarks.reselections [--json] [--steps N] [--methods NAME ...]

Each method trains a small Llama with a re-selection every 20 steps. One run is left alone in one process; the other is
killed with SIGKILL in the middle of each part and goes on with another number of processes under another layout. Losses
of all steps, the entries that train at the end and their values are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row, absolute, finish, options_of
from tests.harness.processes import kill_tree
from trainer.methods.deltas import Delta
from trainer.methods.tuned_runs import Tuned

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS: list[tuple[int, list[str]]] = [
    (1, []),
    (2, ["parallel=fsdp"]),
    (4, ["parallel=tp", "parallel.dp_replicate=2"]),
    (2, ["parallel=zero3"]),
    (2, ["parallel=tp"]),
    (4, ["parallel=fsdp"]),
    (1, []),
]
METHODS = {
    "spiel": ["method.every=20", "method.density=0.02"],
    "lift": ["method.every=20", "method.rank=8", "method.budget_rank=2", "optimizer.lr=1e-3"],
}
MODEL = ["model.hidden_size=64", "model.intermediate_size=172", "model.num_layers=2", "model.num_heads=4"]
MODEL += ["model.num_kv_heads=2", "train.seq_len=32", "train.global_batch=8", "train.micro_batch=2"]
SHARED = ["tracking=none", "eval.every=0", "eval.samples=2", "eval.generate_tokens=0", "checkpoint.every=5"]
WAIT_S = 300.0


def start(overrides: Sequence[str], processes: int, directory: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch", "local", "--nproc", str(processes), "--", *overrides]
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)


def losses(run: Path) -> dict[int, float]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows}


def kill_after(running: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """SIGKILL to all processes of a run once it has finished a step."""
    until = time.monotonic() + WAIT_S
    while max(losses(run), default=0) < step:
        if running.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the run did not reach step {step}: {(run.parent.parent / 'log').read_text()[-2000:]}")
        time.sleep(0.02)
    kill_tree(running.pid)
    running.wait()


def finish_run(running: subprocess.Popen[bytes], directory: Path) -> None:
    if running.wait(WAIT_S) != 0:
        raise RuntimeError(f"a run failed: {(directory / 'log').read_text()[-2000:]}")


def compare(method: str, steps: int, directory: Path, layouts: list[tuple[int, list[str]]]) -> dict[str, Any]:
    """What is different between the two runs."""
    common = [f"method={method}", *METHODS[method], *MODEL, *SHARED, f"train.steps={steps}"]
    finish_run(start(["run.name=whole", *common], 1, directory), directory)
    killed = ["run.name=killed", *common]
    run = directory / "runs" / "killed"
    for number, (processes, layout) in enumerate(layouts[:-1], start=1):
        kill_after(start([*killed, *layout], processes, directory), run, number * steps // len(layouts) + 1)
    processes, layout = layouts[-1]
    finish_run(start([*killed, *layout], processes, directory), directory)
    whole = directory / "runs" / "whole"
    a, b = losses(whole), losses(run)
    assert a.keys() == b.keys() == set(range(1, steps + 1)), "a step is missing or double"
    resumes = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {
        "loss": max(abs(a[step] - b[step]) for step in a),
        "resumes": sum(event["event"] == "resume" for event in resumes),
        **differing(Tuned.open(whole).delta(), Tuned.open(run).delta()),
    }


def differing(a: Delta, b: Delta) -> dict[str, Any]:
    """How many entries are in one and not in the other, and how far values of common ones are apart."""
    others, apart = 0, 0.0
    for name, entries in a.entries.items():
        here = dict(zip(entries.indices.tolist(), entries.values.tolist(), strict=True))
        there = dict(zip(b.entries[name].indices.tolist(), b.entries[name].values.tolist(), strict=True))
        others += len(here.keys() ^ there.keys())
        apart = max([apart, *(abs(here[i] - there[i]) for i in here.keys() & there.keys())])
    return {"entries": others, "values": apart, "count": a.count}


QUICK = {"steps": 12, "methods": ["spiel"], "layouts": 3}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reselections", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layouts", type=int, default=len(LAYOUTS), help="how many of them")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=[*METHODS], metavar="NAME")
    arguments = options_of(parser, QUICK, argv)
    layouts = LAYOUTS[: arguments.layouts]
    full, rows = arguments.steps == 300 and layouts == LAYOUTS, list[Row]()
    for method in arguments.methods:
        with tempfile.TemporaryDirectory() as directory:
            found = compare(method, arguments.steps, Path(directory), layouts)
        print(f"{method}: {found}", file=sys.stderr, flush=True)
        wanted = len(layouts) - 1
        rows += [
            absolute(
                f"largest difference of a loss, {method}", "nats", found["loss"], better="lower", bar=1e-5, full=full
            ),
            absolute(
                f"entries in one run only, {method}", "entries", found["entries"], better="lower", bar=0, full=full
            ),
            absolute(f"resumes, {method}", "resumes", found["resumes"], better="higher", bar=wanted, full=full),
        ]
    return finish("reselections", rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
