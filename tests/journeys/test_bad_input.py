"""Bad input, as a user meets it: one clear paragraph, status 2, no process group, nothing lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from checkpointing.lease import Lease
from checkpointing.storage import FileStorage
from tests.harness.runs import SMALL
from trainer import cli

BASE = [*SMALL, "train.steps=4", "checkpoint.every=2"]


def malformed(directory: Path) -> list[str]:
    (directory / "records.jsonl").write_text('{"text": "fine"}\n{"text": "broken\n')
    return ["data=jsonl", f"data.path={directory}/records.jsonl"]


def empty(directory: Path) -> list[str]:
    (directory / "empty").mkdir()
    return [f"resume={directory}/empty"]


def damaged(directory: Path) -> list[str]:
    for commit in (directory / "run" / "checkpoints").glob("*/COMMIT"):
        commit.write_text("0")
    return []


# What is done to a finished run's directory before the command, its overrides, and what must be said.
CASES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "unknown key": (lambda d: ["train.stepz=3"], "There is no option train.stepz. Did you mean train.steps"),
    "wrong type": (lambda d: ["train.steps=many"], "Value 'many' of type 'str' could not be converted to Integer"),
    "missing data": (lambda d: ["data=text", f"data.path={d}/absent"], "absent does not exist"),
    "malformed line": (malformed, "records.jsonl, line 2 is not JSON"),
    "impossible batch": (lambda d: ["train.global_batch=9"], "Type train.global_batch=8 or train.global_batch=10"),
    "degree that does not fit": (
        lambda d: ["parallel.dp_shard=2"],
        "does not divide the 1 process(es)",
    ),
    "checkpoint of another model": (lambda d: ["model.num_layers=2", "resume_allow=[model]"], "is of another model"),
    "empty checkpoint directory": (empty, "holds no committed generation"),
    "damaged checkpoint directory": (damaged, "Every generation in"),
    "changed settings": (lambda d: ["optimizer.lr=0.5"], "type resume_allow=[optimizer.lr] to go on all the same"),
    "no write permission": (lambda d: ["run.dir=/proc/nowhere"], "cannot be written"),
    "two runs": (lambda d: [], "Another run uses"),
}


def contents(directory: Path) -> dict[Path, bytes | None]:
    """But for the number of the lease, which counts every command that held the directory."""
    found = [path for path in directory.rglob("*") if not path.name.startswith("lease-")]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("case", CASES)
def test_bad_input(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*overrides: str) -> int:
        monkeypatch.setattr(sys, "argv", ["trainer", *BASE, f"run.dir={tmp_path}/run", *overrides])
        return cli.main()

    assert command() == 0
    prepare, message = CASES[case]
    overrides = prepare(tmp_path)
    held = Lease.acquire(FileStorage(tmp_path / "run" / ".lease")) if case == "two runs" else None
    before = contents(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: pytest.fail("a process group was started"))
    assert command(*overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("trainer: ") and error.count("\n") == 1 and message in error, error
    print(f"{case}: {error}", end="")
    assert contents(tmp_path) == before
    if held is not None:
        held.release()
