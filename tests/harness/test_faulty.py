"""Calls on the files of a run are told apart, and fail as they are told to; all others are left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.faulty import Call, Fault, environment, recorded, role_of

WRITER = """
import os, sys
from pathlib import Path
here = Path(sys.argv[1])
here.mkdir()
for name in ("metrics.jsonl", "step-00000012-0123456789abcdef"):
    with open(here / name, "w") as file:
        file.write("a line\\n")
        file.flush()
        os.fsync(file.fileno())
    assert (here / name).read_text() == "a line\\n"
Path(sys.argv[2]).write_text("elsewhere")
os.unlink(here / "metrics.jsonl")
"""


def run_writer(tmp_path: Path, fault: Fault | None = None) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "trainer.py"
    script.write_text(WRITER)
    return subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path / "other")],
        env={**os.environ, **environment({"run": str(tmp_path / "run")}, str(tmp_path / "record"), fault)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.usefixtures("processes")
def test_calls_are_told_apart_by_who_when_which_and_where(tmp_path: Path) -> None:
    assert run_writer(tmp_path).returncode == 0
    calls, faults = recorded(str(tmp_path / "record"))
    assert faults == 0
    for call in (
        Call("trainer", "start", "mkdir", "run"),
        Call("trainer", "start", "create", "run/metrics.jsonl"),
        Call("trainer", "start", "write", "run/metrics.jsonl"),
        Call("trainer", "train", "fsync", "run/metrics.jsonl"),
        Call("trainer", "train", "fsync", "run/step-#-#"),
        Call("trainer", "train", "read", "run/step-#-#"),
        Call("trainer", "train", "unlink", "run/metrics.jsonl"),
    ):
        assert call in calls, f"{call} of {sorted(map(str, calls))}"
    assert not any("other" in call.file for call in calls)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (Call("trainer", "start", "mkdir", "run"), "Stale file handle"),
        (Call("trainer", "start", "create", "run/metrics.jsonl"), "Stale file handle"),
        (Call("trainer", "start", "write", "run/metrics.jsonl"), "Stale file handle"),
        (Call("trainer", "train", "fsync", "run/step-#-#"), "Stale file handle"),
        (Call("trainer", "train", "read", "run/step-#-#"), "Stale file handle"),
        (Call("trainer", "start", "unlink", "run/metrics.jsonl"), ""),  # not in this phase
        (Call("keeper", "serve", "mkdir", "run"), ""),  # not of this process
    ],
    ids=str,
)
def test_the_one_that_is_named_fails(tmp_path: Path, call: Call, says: str) -> None:
    ended = run_writer(tmp_path, Fault(call, "ESTALE", times=1))
    assert (ended.returncode, says in ended.stderr) == (1 if says else 0, True)
    assert recorded(str(tmp_path / "record"))[1] == bool(says)


@pytest.mark.usefixtures("processes")
def test_so_often_and_after_so_many_of_all_processes(tmp_path: Path) -> None:
    mkdir = Call("trainer", "start", "mkdir", "run")
    once = Fault(mkdir, "EIO", times=1)
    assert run_writer(tmp_path, once).returncode == 1 and run_writer(tmp_path, once).returncode == 0
    (tmp_path / "record").unlink()
    assert recorded(str(tmp_path / "record")) == ({}, 0)
    assert run_writer(tmp_path, Fault(mkdir, "EIO", after=1)).returncode == 1  # the directory is there by now
    assert recorded(str(tmp_path / "record"))[1] == 0


def test_who_a_process_is_shows_in_its_words() -> None:
    assert role_of(["-m", "checkpointing.memory.keeper", "/dev/shm/trainer"]) == "keeper"
    assert role_of(["-m", "launch", "local", "--", "run.name=trainer"]) == "launcher"
    assert role_of(["/somewhere/trainer/__main__.py", "run.name=x"]) == "trainer"
    assert role_of(["-c", "pass"]) == ""


def test_a_record_is_lines_of_calls_and_of_faults(tmp_path: Path) -> None:
    call = Call("keeper", "serve", "fsync", "run/checkpoints")
    lines = [["call", call.role, call.phase, call.name, call.file]] * 2 + [["fault", str(call)]]
    (tmp_path / "record").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorded(str(tmp_path / "record")) == ({call: 2}, 1)
