"""A run that the `deepspeed` launcher starts is killed, goes on under FSDP2, and ends under that launcher again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.ports import free_port
from tests.harness.processes import ROOT, kill_tree, wait_for
from tests.harness.runs import SMALL, assert_same_run, environment, events, rows, train
from tests.harness.worlds import SharedWorld

pytestmark = pytest.mark.usefixtures("processes")

RUN = [*SMALL, "train.steps=40", "checkpoint.every=5", "data.log_ids=true", "eval.every=0", "schedule=constant"]
WAIT_S = 120


def deepspeed(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """As its documentation starts a module; the command `deepspeed` does nothing but call this one."""
    port = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *port, *arguments],
            cwd=ROOT,
            env=environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"),
            stdout=output,
            stderr=output,
        )


def test_killed_under_deepspeed_resumed_under_fsdp2_and_finished_under_deepspeed(
    tmp_path: Path, world: SharedWorld
) -> None:
    a, b, log = tmp_path / "a", tmp_path / "b", tmp_path / "log"
    train([*RUN, f"run.dir={a}"])
    command = ["--num_gpus=2", "--module", "trainer", "parallel=zero2", *RUN, f"run.dir={b}"]
    process = deepspeed(command, log)
    try:
        wait_for(lambda: process.poll() is not None or any(row["step"] >= 7 for row in rows(b)), WAIT_S)
        assert process.poll() is None, log.read_text()
    finally:
        kill_tree(process.pid)
        process.wait(30)
    assert {row["world_size"] for row in rows(b)} == {2}

    between = ["parallel=fsdp", *RUN, "train.steps=20", "resume_allow=[train.steps]", f"run.dir={b}"]
    said = world.run(train, 3, between, environment=True)
    assert "parallel.engine was deepspeed, is torch" in said[0]

    process = deepspeed(command, log)
    try:
        assert process.wait(WAIT_S) == 0, log.read_text()
    finally:
        kill_tree(process.pid)
    resumed = [step for event, step in events(b) if event == "resume"]
    assert len(resumed) == 2 and resumed[0] >= 5 and resumed[1] == 20
    assert_same_run(rows(a), rows(b), last=40)
