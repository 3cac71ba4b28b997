"""A run whose processes are all killed again and again, at every moment, against the same run undisturbed.

`python -m benchmarks.kills [--kills 50] [--json]`. A snapshot is taken at every step; before each restart the durable
directory is deleted, so that only memory is left to go on from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kill_points import POINTS
from benchmarks.report import absolute, finish, options_of
from checkpointing.generations import newest, read_index
from checkpointing.geometry import Piece
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage
from checkpointing.tensors import DTYPES
from tests.harness.processes import kill_tree, wait_for
from trainer.compose import compose
from trainer.resume import memory_directory

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 180.0
PER_KILL = 4  # steps of the run between one kill and the next
SETTINGS = [
    "model.hidden_size=64",
    "model.intermediate_size=172",
    "model.num_layers=2",
    "train.seq_len=32",
    "tracking=none",
    "eval.generate_tokens=0",
    "eval.every=0",
    "data.log_ids=true",
    "checkpoint.every=7",
    "checkpoint.memory.every=1",
]


@dataclass(frozen=True)
class Kill:
    point: str
    step: int  # in which it happened
    resumed: int  # the step that the next start went on from
    tier: str
    last_line: int  # of the metrics, when it was killed

    @property
    def lost(self) -> int:
        """Finished steps that had to be computed again."""
        return self.last_line - self.resumed


def run_with_kills(directory: Path, kills: int, processes: int = 2, points: Sequence[str] = POINTS) -> list[Kill]:
    """The disturbed run, to its end."""
    steps = (kills + 1) * PER_KILL
    overrides = [f"run.dir={directory}", f"train.steps={steps}", *SETTINGS]
    told: list[tuple[str, int, int]] = []
    for number in range(kills):
        point, step = points[number % len(points)], (number + 1) * PER_KILL
        _kill_at(point, step, directory, overrides, processes)
        told.append((point, step, _rows(directory)[-1]["step"]))
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    with _started("none", 0, directory, overrides, processes) as process:
        assert process.wait(WAIT_S) == 0, (directory / "log").read_text()[-3000:]
    resumes = [event for event in _rows(directory, "events.jsonl") if event["event"] == "resume"]
    assert len(resumes) == kills, f"{len(resumes)} resumes after {kills} kills"
    return [
        Kill(point, step, resume["step"], resume["tier"], last)
        for (point, step, last), resume in zip(told, resumes, strict=True)
    ]


def run_undisturbed(directory: Path, kills: int, processes: int = 2) -> None:
    overrides = [f"run.dir={directory}", f"train.steps={(kills + 1) * PER_KILL}", *SETTINGS]
    with _started("none", 0, directory, overrides, processes) as process:
        assert process.wait(WAIT_S + kills) == 0, (directory / "log").read_text()[-3000:]


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not have in common: steps, samples, losses, and the bits of their final state."""
    found = []
    left, right = _rows(a), _rows(b)
    for key in ("step", "sample_ids", "loss", "grad_norm"):
        if [row[key] for row in left] != [row[key] for row in right]:
            found.append(key)
    states = [final_state(directory / "checkpoints") for directory in (a, b)]
    if states[0].keys() != states[1].keys():
        found.append("names of tensors")
    found += [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    return found


def memory_of(*runs: Path) -> list[Path]:
    """Where these runs had their memory: nothing of it is to be there when they have ended."""
    found = [memory_directory(compose([f"run.dir={run}"])) for run in runs]
    assert None not in found, f"{runs} had no memory"
    return [path for path in found if path is not None]


def final_state(directory: Path) -> dict[str, torch.Tensor]:
    storage = FileStorage(directory)
    generation = newest(storage)
    assert generation is not None and generation.manifest is not None
    reader = GenerationReader(storage, generation.manifest)
    pieces = [
        Piece(name, torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype]), (0,) * len(tensor.shape), tensor.shape)
        for name, tensor in generation.manifest.tensors.items()
    ]
    reader.load(pieces)
    assert read_index(storage, generation.manifest, 0).objects["trainer"]["step"] == generation.step
    return {piece.name: piece.tensor for piece in pieces}


@contextlib.contextmanager
def _started(point: str, step: int, directory: Path, overrides: list[str], processes: int) -> Any:
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["benchmarks.kill_points", point, str(step), str(directory / "marker"), *overrides]
    with open(directory / "log", "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_tree(process.pid)  # torchrun's workers are sessions of their own
        process.wait(WAIT_S)


def _kill_at(point: str, step: int, directory: Path, overrides: list[str], processes: int) -> None:
    marker = directory / "marker"
    with _started(point, step, directory, overrides, processes) as process:
        wait_for(lambda: marker.exists() or process.poll() is not None)
        assert marker.exists(), f"it ended before {point} of step {step}:\n{(directory / 'log').read_text()[-3000:]}"
        assert marker.read_text() == f"{point} of step {step}"
        if point == "between prepare and commit":
            time.sleep(0.1)  # the other rank gets there
    marker.unlink()


def _rows(directory: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = directory / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


QUICK = {"kills": 3}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    options = options_of(parser, QUICK)
    with tempfile.TemporaryDirectory() as top:
        began = time.monotonic()
        kills = run_with_kills(Path(top, "killed"), options.kills)
        seconds = time.monotonic() - began
        run_undisturbed(Path(top, "undisturbed"), options.kills)
        unequal = differences(Path(top, "killed"), Path(top, "undisturbed"))
        memory = memory_of(Path(top, "killed"), Path(top, "undisturbed"))
    wait_for(lambda: not any(path.exists() for path in memory))
    for kill in kills:
        print(f"{kill.point}, step {kill.step}: on from step {kill.resumed} in {kill.tier}", file=sys.stderr)
    each, full = Counter(kill.point for kill in kills), options.kills >= 50
    least, elsewhere = min(each[point] for point in POINTS), sum(kill.tier != "memory" for kill in kills)
    lost, pace = max(kill.lost for kill in kills), seconds / options.kills
    rows = [
        absolute("kills at the least frequent moment", "kills", least, better="higher", bar=5, full=full),
        absolute("resumed from another tier than memory", "kills", elsewhere, better="lower", bar=0),
        absolute("most finished steps lost by one kill", "steps", lost, better="lower", bar=1),
        absolute("what differs from the undisturbed run", "things", len(unequal), better="lower", bar=0),
        absolute("seconds from one kill to the next", "s", pace, better="lower", bar=120, full=False),
    ]
    return finish("kills", rows, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
