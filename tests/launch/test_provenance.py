"""What a run leaves of the place that it was handed in from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launch.provenance import code, environment, leave_behind
from tests.launch.test_options import called
from trainer.errors import Refused

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.smoke]  # programs that stand in for SLURM's


def test_the_revision_and_what_differs_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / "file").write_text("one\n")
    git("add", "file")
    git("commit", "--quiet", "-m", "x")
    revision, difference = code(tmp_path)
    assert len(revision) == 40 and difference == b""
    (tmp_path / "file").write_text("two\n")
    again, difference = code(tmp_path)
    assert again == revision and b"+two" in difference


def test_without_a_repository(tmp_path: Path) -> None:
    revision, difference = code(tmp_path)
    assert "no repository" in revision and difference == b""


def test_secrets_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    monkeypatch.setenv("CUDA_TOKEN", "hidden")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = json.dumps(environment())
    assert "hidden" not in found and '"OMP_NUM_THREADS": "3"' in found and '"torch"' in found


def test_it_is_all_in_the_run_directory(tmp_path: Path) -> None:
    call = called("slurm", "--exclude", "n7", "--", f"run.dir={tmp_path / 'run'}", "train.steps=7")
    leave_behind(call)
    home = tmp_path / "run" / "launch"
    assert {p.name for p in home.iterdir()} == {"config.yaml", "environment.json", "revision", "code.diff"}
    assert "steps: 7" in (home / "config.yaml").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written"):
        leave_behind(called("slurm", "--", f"run.dir={tmp_path / 'file' / 'run'}"))
