"""The default main job on two processes: what it learns, how long it takes, how busy it keeps the cores.

python -m benchmarks.main_job [--json] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import absolute, cores, finish, options_of

DEFAULT_STEPS = 800


QUICK = {"steps": 20}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.main_job", description=__doc__)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="train.steps (judged at the default only)")
    arguments = options_of(parser, QUICK)
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(Path(directory) / "run", arguments.steps)
    full = arguments.steps == DEFAULT_STEPS and cores() == 2
    rows = [
        absolute("loss of the first step", "nats per byte", measured["first_loss"], better="lower", bar=6.0, full=full),
        absolute(
            "held-out loss at the end", "nats per byte", measured["eval_loss"], better="lower", bar=1.7, full=full
        ),
        absolute("training time", "s", measured["seconds"], better="lower", bar=180, full=full),
        absolute("cores busy while training", "cores", measured["busy"], better="higher", bar=1.8, full=full),
    ]
    return finish("main_job", rows, as_json=arguments.json)


def measure(run_dir: Path, steps: int) -> dict[str, float]:
    """Run the job as a user would, and watch its processes from the first step to the last."""
    command = [
        sys.executable,
        "-m",
        "launch",
        "local",
        "--nproc",
        "2",
        "--",
        f"run.dir={run_dir}",
        f"train.steps={steps}",
    ]
    process = subprocess.Popen(
        command, stdout=sys.stderr, stderr=sys.stderr, env={**os.environ, "WANDB_MODE": "offline"}
    )
    began: tuple[float, float] | None = None
    busy = 0.0
    while process.poll() is None:
        done = _steps(run_dir)
        now = (time.perf_counter(), _cpu_seconds(process.pid))
        if done and began is None:
            began = now
        if began is not None and done < steps and now[0] - began[0] > 1:
            busy = (now[1] - began[1]) / (now[0] - began[0])
        time.sleep(0.2)
    assert process.returncode == 0, f"the main job ended with status {process.returncode}"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    events = {e["event"]: e["monotonic"] for e in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())}
    return {
        "first_loss": rows[0]["loss"],
        "eval_loss": rows[-1]["eval_loss"],
        "seconds": events["finish"] - events["start"],
        "busy": busy,
    }


def _steps(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of all its living descendants."""
    parents: dict[int, list[tuple[int, float]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields: list[Any] = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            parents.setdefault(int(fields[1]), []).append((int(entry.name), ticks))
    total, todo = 0.0, [pid]
    while todo:
        for child, seconds in parents.get(todo.pop(), []):
            total += seconds
            todo.append(child)
    return total


if __name__ == "__main__":
    sys.exit(main())
