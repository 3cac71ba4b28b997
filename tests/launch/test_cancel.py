"""Cancelling the job of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main
from tests.launch.test_scheduler import commands, says  # noqa: F401

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.smoke]  # programs that stand in for SLURM's


def test_the_job_of_the_run_is_ended_once(
    tmp_path: Path,
    commands: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job").write_text("3\n")
    says(commands, "squeue", 'echo "RUNNING|None"')
    says(commands, "scancel", 'echo "$@" >> $0.arguments')
    assert main(["cancel", str(tmp_path)]) == 0
    says(commands, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert main(["cancel", str(tmp_path)]) == 0
    assert (commands / "scancel.arguments").read_text() == "3\n"
    assert "job 3 has ended long ago" in capsys.readouterr().out
    says(commands, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert main(["cancel", str(tmp_path)]) == 2  # which is not to say that it has ended
    assert "Unable to contact slurm controller" in capsys.readouterr().err
