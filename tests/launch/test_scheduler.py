"""What SLURM's commands say, in one paragraph."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import scheduler
from launch.scheduler import ask, release, state_of, submit
from trainer.errors import Refused

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.smoke]  # programs that stand in for SLURM's


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory before all others for commands that say what a test wants."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def says(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_a_submission_gives_the_jobs_number(commands: Path) -> None:
    says(commands, "sbatch", 'echo "$@" > $0.arguments; echo "17;cluster"')
    assert submit("job.sh", ["--x"]) == "17"
    assert (commands / "sbatch.arguments").read_text() == "--parsable --x job.sh\n"


def test_what_slurm_refuses_is_told(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: nope' >&2; exit 1")
    with pytest.raises(Refused, match=r"sbatch says: invalid partition specified: nope\. Mend that"):
        submit("job.sh")
    says(commands, "sbatch", "exec sleep 20")
    monkeypatch.setattr(scheduler, "WAIT_S", 0.3)
    with pytest.raises(Refused, match="controller is away"):
        submit("job.sh")


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Refused, match="There is no squeue on this machine"):
        ask("squeue")


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("RUNNING|None", ("RUNNING", "None")),
        ("PENDING|BeginTime", ("PENDING", "BeginTime")),
        ("COMPLETED|None\nPENDING|Resources\nRUNNING|None", ("RUNNING", "None")),
        ("", ("", "")),
    ],
)
def test_states(said: str, found: tuple[str, str], commands: Path) -> None:
    (commands / "said").write_text(said)
    says(commands, "squeue", f"cat {commands}/said")
    assert state_of("1") == found
    says(commands, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert state_of("1") == ("", "")


def test_a_release_is_no_error_while_a_job_ends(commands: Path) -> None:
    says(commands, "scontrol", 'echo "$@" > $0.arguments; exit 1')
    release("9")
    assert (commands / "scontrol.arguments").read_text() == "update JobId=9 StartTime=now\n"
