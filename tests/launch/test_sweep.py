"""Sweeps: the points that overrides span, and each as a run of its own."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.options import quote
from launch.status import POINTS
from launch.sweep import _refuse_other_points, _write_down, points
from tests.harness.processes import wait_for
from tests.harness.runs import SMALL, launched, rows
from tests.launch.test_options import called
from trainer.elastic.preemption import AGAIN
from trainer.errors import Refused


def test_every_combination_has_a_name_and_a_directory() -> None:
    words = ["run.name=lr", "optimizer.lr=1e-3,1e-4", "method=lora,full", "optimizer.betas=[0.9,0.95]"]
    found = points(called("local", "--multirun", "--nproc=2", "--", *words))
    assert [one.config.run.dir for one in found] == [f"runs/lr/{n}" for n in range(4)]
    assert [(one.config.optimizer.lr, one.config.run.name) for one in found[1:3]] == [(1e-3, "lr-1"), (1e-4, "lr-2")]
    assert all(one.config.launch.nproc == 2 and not one.multirun for one in found)
    assert "optimizer.betas=[0.9,0.95]" in found[0].overrides and "run.name=lr" not in found[0].overrides


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.steps=3"], "no override has several values"),
        (["optimizer.lr=interval(0,1)"], "is no list of values"),
        (["train.steps=3,x"], "x"),
        (["train.steps=3,0"], "train.steps=0"),
    ],
)
def test_what_spans_nothing_or_does_not_compose_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        points(called("local", "--multirun", "--", *words))


@pytest.mark.usefixtures("processes")
def test_points_train_one_after_another_and_a_table_ends_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "train.steps=2", "optimizer.lr=1e-2,1e-3", f"run.dir={tmp_path}"]
    assert main(["local", "--multirun", "--", *words]) == 0
    table = capfd.readouterr().out.splitlines()[-3:]
    assert table[0].split() == ["point", "state", "step", "loss", "held", "out", "optimizer.lr"]
    assert all(line.split()[1:3] == ["finished", "2/2"] for line in table[1:])
    assert [rows(tmp_path / n)[-1]["step"] for n in "01"] == [2, 2]


@pytest.mark.usefixtures("processes")
def test_a_point_that_fails_is_the_status_of_the_sweep(tmp_path: Path) -> None:
    words = [*SMALL, "train.steps=2", "optimizer.lr=1e-3,1e30", "optimizer.clip=0", "schedule.warmup_steps=0"]
    assert main(["local", "--multirun", "--", *words, f"run.dir={tmp_path}"]) == 1


@pytest.mark.usefixtures("processes")
def test_a_point_that_is_preempted_is_the_last(tmp_path: Path) -> None:
    log, words = tmp_path / "log", [*SMALL, "train.steps=100000,200000", f"run.dir={tmp_path}/sweep"]
    with launched(1, words, log, ["--multirun"]) as process:
        wait_for(lambda: bool(rows(tmp_path / "sweep" / "0")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == AGAIN
    assert "which is saved" in log.read_text() and not (tmp_path / "sweep" / "1").exists()


@pytest.mark.parametrize("name", ["it's mine", "a=1"])
def test_names_with_any_character(name: str, tmp_path: Path) -> None:
    (first, _) = points(called("local", "--multirun", "--", f"run.name={quote(name)}", "train.steps=1,2"))
    assert first.config.run.name == f"{name}-0" and first.config.run.dir == f"runs/{name}/0"


def test_an_array_of_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run.dir={tmp_path}", "optimizer.lr=1,2,3"]
    assert main(["slurm", "--multirun", "--dry-run", "--parallel-points=2", "--", *words]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2" in said and f"#SBATCH --output={tmp_path}/launch/job-%A_%a.log" in said
    assert f"  2) run={tmp_path}/2; overrides=(launch=slurm optimizer.lr=3 " in said


def test_other_points_under_the_same_name_are_refused(tmp_path: Path) -> None:
    """Their table would give one point the other's result."""
    rates = "optimizer.lr=1e-3,1e-4,1e-5"
    first, second, third = points(called("local", "--multirun", "--", f"run.dir={tmp_path}", rates))
    other = replace(third, config=second.config)  # in the place of the second
    _refuse_other_points(tmp_path, [first, second])  # nothing is there
    _write_down(tmp_path, [first, second])
    _refuse_other_points(tmp_path, [first, other])  # and point 1 has not begun
    for number in "01":
        (tmp_path / number).mkdir()
        (tmp_path / number / "metrics.jsonl").touch()
    _refuse_other_points(tmp_path, [first, second])
    _refuse_other_points(tmp_path, [first, second, third])  # one more
    longer = [replace(one, overrides=[*one.overrides, "train.steps=9"]) for one in (first, second)]
    _refuse_other_points(tmp_path, longer)  # the same points, for longer
    with pytest.raises(Refused, match=r"point 1 was optimizer\.lr=0\.0001, and is optimizer\.lr=1e-05 now"):
        _refuse_other_points(tmp_path, [first, other])
    (tmp_path / POINTS).write_text("[[")
    _refuse_other_points(tmp_path, [first, other])
