"""A run's directory from elsewhere does not make the run write into another place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.compose import compose
from trainer.errors import Refused
from trainer.inside import refuse_links
from trainer.parallel.world import World
from trainer.rundir import hold_run_directory


@pytest.mark.parametrize(
    "name",
    [
        *("hf", "hf/config.json", "wandb", "profile", "tensorboard", "launch", "launch/job", "checkpoints", ".lease"),
        *("metrics.jsonl", "metrics.discarded.jsonl", "config.yaml", "checkpoints/.lease", "checkpoints/hold-x.json"),
    ],
)
def test_a_link_out_of_it_is_refused_and_what_it_leads_to_is_left_alone(tmp_path: Path, name: str) -> None:
    run, target = tmp_path / "run", tmp_path / "elsewhere"
    (run / name).parent.mkdir(parents=True)
    target.mkdir()
    (run / name).symlink_to(target)
    config = compose([f"run.dir={run}"])
    with pytest.raises(Refused, match=r"is a link to .*elsewhere.* type checkpoint\.dir="):
        hold_run_directory(config, World()).__enter__()
    assert list(target.iterdir()) == []


def test_links_that_stay_inside_are_a_run_s_own(tmp_path: Path) -> None:
    """As wandb makes them; and where the run itself lies may be a link."""
    run = tmp_path / "scratch" / "run"
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "wandb" / "debug.log").symlink_to("run-1/logs/debug.log")  # which is not there yet
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    refuse_links(tmp_path / "runs" / "run", tmp_path / "runs" / "run" / "checkpoints")
    refuse_links(tmp_path / "nowhere", tmp_path / "nowhere" / "checkpoints")


def test_checkpoints_elsewhere_are_typed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    refuse_links(tmp_path / "run", tmp_path / "link")
    (tmp_path / "disk" / "step-00000001-0123456789abcdef").symlink_to(tmp_path)
    with pytest.raises(Refused, match="is a link to"):
        refuse_links(tmp_path / "run", tmp_path / "link")


def test_what_nobody_may_look_into_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lost+found is, where a run has a volume of its own."""
    hidden = tmp_path / "lost+found"
    hidden.mkdir()
    (hidden / "out").symlink_to("/")
    with pytest.raises(Refused, match="is a link to /"):  # the control
        refuse_links(tmp_path, tmp_path / "checkpoints")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != hidden and access(path, mode))
    refuse_links(tmp_path, tmp_path / "checkpoints")
