"""A run that `accelerate launch` starts is killed, goes on under FSDP2, and ends under accelerate with DeepSpeed."""

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
# What `accelerate config` asks for and writes.
CONFIGURED = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero_stage: 2
mixed_precision: 'no'
num_machines: 1
use_cpu: false
"""


def accelerate_launch(arguments: list[str], home: Path, log: Path) -> subprocess.Popen[bytes]:
    """As its documentation starts a script; a home of its own, so that no configuration on this machine counts."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *arguments],
            cwd=ROOT,
            env=environment(HF_HOME=str(home), OMP_NUM_THREADS="1"),
            stdout=output,
            stderr=output,
        )


def test_killed_under_accelerate_launch_resumed_under_fsdp2_and_finished_with_deepspeed(
    tmp_path: Path, world: SharedWorld
) -> None:
    a, b, log = tmp_path / "a", tmp_path / "b", tmp_path / "log"
    train([*RUN, f"run.dir={a}"])
    flags = ["--num_processes=2", "--main_process_ip=127.0.0.1"]
    command = ["-m", "trainer", "parallel=accelerate", *RUN, f"run.dir={b}"]
    process = accelerate_launch(["--multi_gpu", *flags, "--main_process_port=0", *command], tmp_path, log)
    try:
        wait_for(lambda: process.poll() is not None or any(row["step"] >= 7 for row in rows(b)), WAIT_S)
        assert process.poll() is None, log.read_text()
    finally:
        kill_tree(process.pid)
        process.wait(30)
    assert {row["world_size"] for row in rows(b)} == {2}

    between = ["parallel=fsdp", *RUN, "train.steps=20", "resume_allow=[train.steps]", f"run.dir={b}"]
    said = world.run(train, 3, between, environment=True)
    assert "parallel.engine was accelerate, is torch" in said[0]

    (tmp_path / "accelerate.yaml").write_text(CONFIGURED)
    zero = [f"--config_file={tmp_path / 'accelerate.yaml'}", f"--main_process_port={free_port()}"]
    process = accelerate_launch([*zero, *flags, *command], tmp_path, log)
    try:
        assert process.wait(WAIT_S) == 0, log.read_text()
    finally:
        kill_tree(process.pid)
    assert "2 on cpu: DeepSpeed, ZeRO stage 2 (set up by accelerate)" in log.read_text()
    resumed = [step for event, step in events(b) if event == "resume"]
    assert len(resumed) == 2 and resumed[0] >= 5 and resumed[1] == 20
    assert_same_run(rows(a), rows(b), last=40)


def test_one_process_in_the_place_of_several_is_refused(tmp_path: Path) -> None:
    """On CPUs `accelerate launch --cpu` starts one process where there is no MPI, whatever was asked for."""
    log = tmp_path / "log"
    flags = ["--cpu", "--num_processes=2"]
    process = accelerate_launch(
        [*flags, "-m", "trainer", "parallel=accelerate", f"run.dir={tmp_path}/run"], tmp_path, log
    )
    try:
        assert process.wait(WAIT_S) != 0
    finally:
        kill_tree(process.pid)
    assert "trainer: `accelerate launch --cpu` leaves several processes to MPI" in log.read_text()
    assert not (tmp_path / "run").exists()
