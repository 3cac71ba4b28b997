"""What becomes of a job, from its run directory alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpointing import save, stores
from launch.health import OPTIONS
from launch.job import BatchJob, Decision, decide, in_vain
from launch.job import main as job_main
from launch.slurm import _checkpoints
from tests.launch.test_scheduler import commands, says  # noqa: F401
from trainer.outcome import DIRECTORY, Outcome, leave

KILLED = {"step": 10, "ended": "ended without a word"}


@pytest.mark.parametrize(
    ("outcome", "attempts", "again", "status", "why"),
    [
        (Outcome(0, True), 9, False, 0, "finished"),
        (Outcome(75, False, "preempted after step 12"), 3, True, 0, "preempted after step 12"),
        (Outcome(75, False, "preempted: its 100 seconds have passed"), 9, False, 1, "Gives up after 9 attempts"),
        (Outcome(2, True, "no such data"), 1, False, 1, "failed for good: no such data"),
        (Outcome(1, True, "a loss of nan"), 1, False, 1, "failed for good: a loss of nan"),
        (Outcome(1, False, "connection closed"), 1, True, 0, "failed: connection closed"),
        (None, 3, True, 0, "ended without a word"),
        (None, 4, False, 1, "Gives up after 4 attempts"),
        (Outcome(1, False, "connection closed"), 4, False, 1, "Gives up after 4 attempts"),
    ],
)
def test_decisions(outcome: Outcome | None, attempts: int, again: bool, status: int, why: str) -> None:
    found = decide(outcome, [KILLED] * attempts, 10, 3)
    assert (found.again, found.status) == (again, status) and why in found.why
    if outcome is None or not outcome.final:  # progress: a newer step is committed than the last attempts began at
        assert decide(outcome, [KILLED] * attempts, 11, 3).again


def test_attempts_in_vain_are_those_at_the_end_whatever_ended_them() -> None:
    preempted = {"step": 10, "ended": "preempted after step 10"}
    assert in_vain([], 10) == 0
    assert in_vain([{"step": 10}, {"step": 9}, KILLED, preempted, KILLED], 10) == 3
    assert in_vain([KILLED, KILLED], 11) == 0


@pytest.fixture
def run(tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    home = tmp_path / "run"
    (home / "launch").mkdir(parents=True)
    options = {"checkpoints": str(home / "checkpoints"), "max_requeues": 2, "exclude": "n9", "health": "", "gpus": 0}
    for key, value in {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", OPTIONS: json.dumps(options)}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv(DIRECTORY, str(home / "launch" / "attempt-5-0"))
    says(commands, "scontrol", f'[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >> {tmp_path}/told')
    return home


def told(run: Path) -> list[str]:
    path = run.parent / "told"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_an_attempt_that_is_killed_again_and_again_gives_up(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        assert job_main(["begin", str(run)]) == 0
        assert job_main(["end", str(run)]) in (0, 1)
    assert told(run) == ["requeue 5", "requeue 5"]
    assert "Gives up after 3 attempts in a row without a new committed step" in capsys.readouterr().out
    # Not even `end` is reached where the script is killed: the next attempt sees it.
    assert job_main(["begin", str(run)]) == 1
    # What it gave up on was mended, and another job begins with nothing against it.
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    assert job_main(["begin", str(run)]) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert not (run / "launch" / "begun").exists()
    save(run / "checkpoints", 7, [])
    assert job_main(["begin", str(run)]) == 0
    assert BatchJob(run, {}).attempts()[-1]["step"] == 7
    assert (run / "launch" / "begun").read_text() == "5\n"  # from now on it goes on from its own


def test_what_was_there_before_the_job_is_not_its_own(run: Path) -> None:
    save(run / "checkpoints", 7, [])
    for _ in range(2):
        assert job_main(["begin", str(run)]) == 0
    assert not (run / "launch" / "begun").exists()


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_controller_that_is_away_is_asked_again_and_what_it_refuses_is_said(
    run: Path,
    commands: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    says(commands, "scontrol", f"[ -e {run}/tried ] && exit 0; touch {run}/tried; echo away >&2; exit 1")
    assert job_main(["begin", str(run)]) == 0
    assert job_main(["end", str(run)]) == 0
    assert "does not requeue" not in capsys.readouterr().out
    monkeypatch.setattr("launch.job.REQUEUE_S", 0.5)
    says(commands, "scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    assert job_main(["begin", str(run)]) == 0
    assert job_main(["end", str(run)]) == 1
    said = capsys.readouterr().out
    assert "SLURM does not requeue it (Requested operation is presently disabled). Type the command" in said
    assert BatchJob(run, {}).attempts()[-1]["again"] is False


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_warned_before_training_it_comes_back_but_not_for_ever(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert job_main(["begin", str(run)]) == 0
        assert job_main(["early", str(run)]) == 0
    assert told(run) == ["requeue 5", "requeue 5"]
    assert job_main(["begin", str(run)]) == 0
    assert job_main(["early", str(run)]) == 1
    assert "gives up after 3 attempts" in capsys.readouterr().out


def test_a_job_that_slurm_ends_does_not_bring_itself_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_main(["begin", str(run)]) == 0
    leave(Outcome(75, False, "preempted after step 7"))
    assert job_main(["leave", str(run)]) == 1
    assert told(run) == [] and BatchJob(run, {}).attempts()[-1]["ended"] == "preempted after step 7"
    leave(Outcome(0, True))
    assert job_main(["leave", str(run)]) == 0  # it had finished


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_machine_that_is_not_healthy_is_excluded_and_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job_main(["begin", str(run)]) == 0
    directory = run / "launch" / "attempt-5-0"
    well = {"rank": 0, "why": "", "together": "", "missing": []}
    (directory / "health-n1.json").write_text(json.dumps(well))
    assert job_main(["admit", str(run)]) == 1
    assert "n2 is not healthy and is excluded: it did not report" in capsys.readouterr().out
    assert told(run) == ["requeue 5", "update JobId=5 ExcNodeList=n9,n2"]
    (directory / "health-n2.json").write_text(json.dumps({**well, "rank": 1}))
    assert job_main(["admit", str(run)]) == 0
    # Together they fail, and nobody is to blame: again, and nobody is excluded.
    (directory / "health-n2.json").write_text(json.dumps({**well, "rank": 1, "together": "a sum is wrong"}))
    assert job_main(["begin", str(run)]) == 0
    assert job_main(["admit", str(run)]) == 1
    assert "they fail together: a sum is wrong" in capsys.readouterr().out
    assert told(run)[2:] == ["requeue 5", "update JobId=5 ExcNodeList=n9,n2"]  # n2 as before


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_no_healthy_machine_at_all_excludes_none(run: Path) -> None:
    assert job_main(["begin", str(run)]) == 0
    assert job_main(["admit", str(run)]) == 1
    assert told(run) == []


def test_a_decision_is_what_it_says() -> None:
    assert decide(Outcome(0, True), [], 0, 0) == Decision(False, 0, "finished")


def test_checkpoints_in_a_store_are_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "STORES", dict(stores.STORES))
    monkeypatch.setattr(stores, "_files", {})
    file = tmp_path / "mine.py"
    file.write_text(
        "from checkpointing import FileStorage\n"
        f"def STORE(rest):\n    return FileStorage({str(tmp_path / 'elsewhere')!r} + '/' + rest)\n"
    )
    save(tmp_path / "elsewhere" / "a", 7, [])
    options = {"checkpoints": "mine://a", "store": str(file)}
    assert BatchJob(tmp_path, {OPTIONS: json.dumps(options)}).step() == 7
    assert _checkpoints("mine://a") == options  # as the launcher tells it, whose configuration has loaded the file
    assert _checkpoints("memory://a") == {"checkpoints": "memory://a"}
    monkeypatch.chdir(tmp_path)
    assert _checkpoints("runs/x") == {"checkpoints": str(tmp_path / "runs" / "x")}
