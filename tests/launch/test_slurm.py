"""The script of a job, without a cluster; `tests/journeys/test_slurm.py` has one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.slurm import plan, which_run
from tests.launch.test_options import called
from tests.launch.test_scheduler import commands, says  # noqa: F401

WORDS = ['run.name="it\'s mine"', "train.steps=5", "optimizer.lr=1e-3"]


def test_the_script_says_what_was_asked(tmp_path: Path) -> None:
    flags = ["--nodes=2-4", "--nproc=8", "--time=8:00:00", "--partition=gpu", "--gpus=8", "--warn-s=200"]
    flags += ["--setup=module load cuda", "--srun=--container-image=a b", "--sbatch=--constraint=a100"]
    text = plan(called("slurm", *flags, "--", *WORDS, f"run.dir={tmp_path}", "checkpoint.memory.every=1")).text
    lines = text.splitlines()
    for flag in (
        "--nodes=2-4",
        "--time=8:00:00",
        "--partition=gpu",
        "--gres=gpu:8",
        "--signal=B:USR1@200",
        "--requeue",
        "--open-mode=append",
        "--constraint=a100",
        f"--output={tmp_path}/launch/job-%j.log",
    ):
        assert f"#SBATCH {flag}" in lines
    assert "module load cuda" in lines and "'--container-image=a b')" in text and "--nproc 8" in text
    assert "elastic.grace_s=180" in text and "launch.keeper" in text and "{{" not in text
    plain = plan(called("slurm", "--", *WORDS, "elastic.grace_s=7")).text
    assert "launch.keeper" not in plain and plain.count("grace_s") == 1


def test_it_is_a_script_and_its_overrides_arrive(tmp_path: Path) -> None:
    call = called("slurm", "--", *WORDS, "model.dropout=0.0")
    text = plan(call).text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    echo = f'{which_run([call, call])}\nprintf "%s\\n" "$run" "${{overrides[@]}}"'
    done = subprocess.run(["bash", "-c", echo], env={"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == call.overrides


def test_what_slurm_does_not_take_leaves_no_job(
    tmp_path: Path,
    commands: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    says(commands, "sbatch", '[ "$1" = --version ] || { echo "sbatch: error: invalid partition: x" >&2; exit 1; }')
    run = tmp_path / "run"
    assert main(["slurm", "--partition", "x", "--", f"run.dir={run}"]) == 2
    assert capsys.readouterr().err.startswith("launch: sbatch says: invalid partition: x. Mend that")
    assert not (run / "launch" / "job").exists()


def test_without_slurm_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["slurm", "--", f"run.dir={tmp_path / 'run'}"]) == 2
    assert not (tmp_path / "run").exists()
