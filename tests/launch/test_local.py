"""`python -m launch local`: what it would run, what it runs, and the status it exits with."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.command import TRAINER
from tests.harness.processes import descendants, kill_tree, wait_for
from tests.harness.runs import SMALL, launch, launched, rows
from tests.harness.runs import environment as launch_environment

pytestmark = pytest.mark.usefixtures("processes")

TINY = [*SMALL, "train.steps=3", "checkpoint.every=0"]


def test_the_printed_command_is_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--nproc", "3", "--dry-run", "--", "train.steps=5", "run.name=a b"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0].startswith("OMP_NUM_THREADS=")
    assert words[2:4] == ["-m", "torch.distributed.run"]
    assert words[4:7] == ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=3"]
    assert words[-3:] == [str(TRAINER), "train.steps=5", "run.name=a b"]


def test_the_printed_command_works_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--nproc", "2", "--dry-run", "--", *TINY, f"run.dir={tmp_path}"]) == 0
    command = capsys.readouterr().out
    done = subprocess.run(command, shell=True, cwd="/", env=launch_environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [r["world_size"] for r in rows(tmp_path)] == [2, 2, 2]


def test_it_exits_with_the_trainers_refusal(tmp_path: Path) -> None:
    done = launch(2, [*TINY, f"run.dir={tmp_path}", "data=jsonl", f"data.path={tmp_path}/absent.jsonl"])
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "absent.jsonl" in line]
    assert len(lines) == 1 and lines[0].startswith("trainer: data.path=")
    assert "Traceback" not in done.stderr


@pytest.mark.smoke
def test_it_exits_with_the_trainers_failure(tmp_path: Path) -> None:
    done = launch(2, [*TINY, f"run.dir={tmp_path}", "optimizer.lr=1e30", "optimizer.clip=0", "schedule.warmup_steps=0"])
    assert done.returncode == 1
    assert done.stderr.count("trainer: Step") == 1 and "failed with status 1" in done.stderr


@pytest.mark.smoke
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named(tmp_path: Path, rank: int) -> None:
    log = tmp_path / "log"
    with launched(2, [*SMALL, "train.steps=100000", f"run.dir={tmp_path / 'run'}"], log) as process:
        wait_for(lambda: len(rows(tmp_path / "run")) > 3)
        worker = next(
            p for p in descendants(process.pid) if f"\0LOCAL_RANK={rank}\0" in Path(f"/proc/{p}/environ").read_text()
        )
        os.kill(worker, signal.SIGKILL)
        assert process.wait(60) == 128 + signal.SIGKILL
        assert (
            f"rank {rank} was ended by signal 9; with resume=auto, the default, the same command goes on"
            in log.read_text()
        )
        kill_tree(process.pid)
