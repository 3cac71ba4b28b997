"""DeepSpeed's launcher and accelerate's, started by our command and by hand from its print; and two torchruns."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing.generations import candidates
from checkpointing.lease import Lease
from checkpointing.storage import FileStorage
from launch.port import is_free
from launch.supervise import trainers
from tests.harness.ports import free_port
from tests.harness.processes import ROOT, kill_tree, wait_for
from tests.harness.runs import SMALL, assert_same_run, environment, events, rows, train, trainer

pytestmark = pytest.mark.usefixtures("processes")

RUN = [*SMALL, "train.steps=40", "checkpoint.every=10", "data.log_ids=true", "eval.every=0", "schedule=constant"]


@contextlib.contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "ab") as output:
        command = [sys.executable, "-m", "launch", *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(HF_HOME=str(log.parent)), stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait(30)


@pytest.mark.parametrize("target", ["deepspeed", "accelerate"])
def test_by_our_command_and_by_hand_from_its_print(target: str, tmp_path: Path) -> None:
    a, b, log = tmp_path / "a", tmp_path / "b", tmp_path / "log"
    train([*RUN, f"run.dir={a}"])
    words = [target, "--nproc=2", f"--port={free_port()}"]
    with started([*words, "--", *RUN, f"run.dir={b}"], log) as process:
        wait_for(lambda: process.poll() is not None or any(row["step"] >= 7 for row in rows(b)))
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(90) == 75, log.read_text()
    assert {row["world_size"] for row in rows(b)} == {2} and events(b)[-1][0] == "preempt"
    printed = trainer(*words, "--dry-run", "--", *RUN, f"run.dir={b}", module="launch").stdout
    done = subprocess.run(
        printed,
        shell=True,
        cwd="/",
        env=environment(HF_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(rows(a), rows(b), last=40)


@pytest.mark.smoke
@pytest.mark.parametrize("target", ["deepspeed", "accelerate"])
def test_a_refusal_of_the_trainer_is_the_status(target: str, tmp_path: Path) -> None:
    words = [target, "--nproc=2", f"--port={free_port()}", "--", *RUN, f"run.dir={tmp_path}/run"]
    done = trainer(*words, "data=jsonl", f"data.path={tmp_path}/absent.jsonl", module="launch")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "absent.jsonl" in done.stdout + done.stderr


def test_what_rank_0_alone_refuses_is_the_refusal_of_the_command(tmp_path: Path) -> None:
    """Its sentence, once, and its status; the other processes do not wait for one that is gone."""
    held = Lease.acquire(FileStorage(tmp_path / "run" / ".lease"))
    done = trainer("local", "--nproc=3", "--", *RUN, f"run.dir={tmp_path}/run", module="launch")
    assert done.returncode == 2, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("Another run uses") == 1, done.stdout + done.stderr
    held.check(anew=True)
    held.release()


def test_trainers_whose_launcher_is_killed_save_and_end(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["local", "--nproc=2", "--", *RUN, "train.steps=100000", "checkpoint.every=0", f"run.dir={run}"]
    with started(words, log) as launcher:
        wait_for(lambda: any(row["step"] >= 10 for row in rows(run)) or launcher.poll() is not None)
        pids = trainers(launcher.pid)
        assert len(pids) == 2, log.read_text()
        launcher.kill()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
    assert log.read_text().count("what started this run is gone") == 1
    last = rows(run)[-1]["step"]
    assert [g.step for g in candidates(FileStorage(run / "checkpoints"))] == [last]
    Lease.acquire(FileStorage(run / ".lease")).release()  # it is given back


def test_two_torchruns_of_which_one_is_lost_and_comes_back(tmp_path: Path) -> None:
    """The run goes on with the machine that is left, and on both when they are two again."""
    a, b, log = tmp_path / "a", tmp_path / "b", tmp_path / "log"
    steps = ["train.steps=1500", "checkpoint.every=20", "checkpoint.keep=1"]
    port = free_port()
    words = ["torchrun", "--nodes=1:2", f"--endpoint=localhost:{port}", "--nproc=1", "--", *RUN, *steps, f"run.dir={b}"]
    with started(words, log) as first, contextlib.ExitStack() as others:
        # The machine where they meet is the one that may not be lost.
        wait_for(lambda: not is_free(port) or first.poll() is not None)
        second = others.enter_context(started(words, tmp_path / "second"))
        wait_for(lambda: any(row["step"] >= 30 for row in rows(b)) or first.poll() is not None)
        assert first.poll() is None and rows(b)[-1]["world_size"] == 2, log.read_text()
        kill_tree(second.pid)
        wait_for(lambda: (bool(rows(b)) and rows(b)[-1]["world_size"] == 1) or first.poll() is not None)
        assert first.poll() is None, log.read_text()
        alone = rows(b)[-1]["step"]
        third = others.enter_context(started(words, tmp_path / "third"))
        wait_for(lambda: rows(b)[-1]["world_size"] == 2 or first.poll() is not None)
        assert first.poll() is None and rows(b)[-1]["step"] > alone, log.read_text()
        for process in (first, third):
            process.send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in (first, third)] == [75, 75], log.read_text()
    last = rows(b)[-1]["step"]
    train([*RUN, *steps, f"train.steps={last}", "schedule.warmup_steps=50", f"run.dir={a}"])
    assert_same_run(rows(a), rows(b), last=last)
    assert [event for event, _ in events(b) if event == "resize"] == ["resize"] * 2
