"""Machines look at themselves and at each other before training, and what they say is put together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import free_port
from launch.health import main, meet, reports
from tests.conftest import ROOT
from trainer.outcome import DIRECTORY


def look(tmp_path: Path, health: str = "", size: int = 2, missing: int = -1) -> dict[str, str]:
    """As the step of a job, a process a machine; why each cannot be used."""
    (tmp_path / "launch").mkdir(exist_ok=True)
    (tmp_path / "launch" / "job.json").write_text(json.dumps({"health": health}))
    directory = tmp_path / "reports"
    directory.mkdir()
    endpoint = f"127.0.0.1:{free_port()}"
    processes = []
    for rank in range(size):
        if rank != missing:
            place = {"SLURMD_NODENAME": f"n{rank}", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size)}
            environment = {**os.environ, **place, DIRECTORY: str(directory)}
            command = [sys.executable, "-m", "launch.health", str(tmp_path), endpoint]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert all(process.wait(120) == 0 for process in processes)
    return reports(directory, [f"n{rank}" for rank in range(size)])


def test_healthy_machines_sum_together(tmp_path: Path) -> None:
    assert look(tmp_path) == {"n0": "", "n1": ""}


def test_one_that_is_not_well_is_told_from_the_others(tmp_path: Path) -> None:
    found = look(tmp_path, health='echo no GPU >&2; test "$SLURMD_NODENAME" != n1')
    assert found["n0"] == "" and "status 1: no GPU" in found["n1"]


def test_one_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.health.PATIENCE_S", 1)
    said = meet(f"127.0.0.1:{free_port()}", 0, 2, "")
    assert said.startswith("the machines do not reach each other")
    assert meet("127.0.0.1:1", 1, 2, "").startswith("the machines do not reach each other at 127.0.0.1:1")


def test_reports_put_together(tmp_path: Path) -> None:
    def write(node: str, why: str = "", together: str = "") -> None:
        (tmp_path / f"health-{node}.json").write_text(json.dumps({"why": why, "together": together}))

    write("a")
    assert reports(tmp_path, ["a", "b"]) == {"a": "", "b": "it did not report"}
    (tmp_path / "health-b.json").write_text("{")
    assert reports(tmp_path, ["a", "b"])["b"] == "it did not report"
    write("b", together="unreachable")
    assert reports(tmp_path, ["a", "b"]) == {"a": "", "b": "unreachable"}
    write("a", together="nobody came")
    assert reports(tmp_path, ["a", "b"]) == {"a": "", "b": "unreachable"}
    write("a", why="disk: full", together="")
    assert reports(tmp_path, ["a", "b"]) == {"a": "disk: full", "b": ""}  # alone it is well


def test_its_words_are_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    with pytest.raises(KeyError):
        main(["run", "host:1"])
