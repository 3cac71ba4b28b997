"""Following and cancelling a job: which one, and what is said at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main
from launch.follow import how
from tests.launch.test_scheduler import commands, says  # noqa: F401

EVENTS = '{{"event": "start", "step": 0}}\n{{"event": "{}", "step": 3}}\n'


@pytest.fixture
def run(tmp_path: Path, commands: Path) -> Path:  # noqa: F811
    (tmp_path / "run" / "launch").mkdir(parents=True)
    (tmp_path / "run" / "launch" / "job").write_text("3\n")
    return tmp_path / "run"


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_it_prints_what_the_job_prints_and_tells_how_it_ended(
    run: Path,
    commands: Path,  # noqa: F811
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    (run / "launch" / "job-3.log").write_text("hello\n")
    (run / "events.jsonl").write_text(EVENTS.format("finish"))
    says(commands, "squeue", 'echo "COMPLETED|None"')
    assert main(["follow", str(run)]) == 0
    assert capfdbinary.readouterr().out == b"hello\n"
    (run / "events.jsonl").write_text(EVENTS.format("failure"))
    (run / "launch" / "attempts.jsonl").write_text('{"ended": "failed for good: no data"}\n')
    assert main(["follow", str(run)]) == 1
    assert b"is not finished: failed; failed for good: no data" in capfdbinary.readouterr().err


def test_a_run_that_never_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert how(tmp_path, "CANCELLED") == 1
    assert "not started; CANCELLED" in capsys.readouterr().err
    assert main(["follow", str(tmp_path)]) == 2
    assert "was not handed to SLURM from here" in capsys.readouterr().err
