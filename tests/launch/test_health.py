"""Machines look at themselves and at each other before training, and what they say is put together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.health import OPTIONS, main, meet, reports
from tests.harness.ports import free_port
from tests.harness.processes import ROOT
from trainer.outcome import DIRECTORY


def look(tmp_path: Path, health: str = "", size: int = 2, gpus: int = 0) -> tuple[dict[str, str], str]:
    """As the step of a job, a process a machine; why machines cannot be used."""
    options = json.dumps({"health": health, "gpus": gpus})
    directory = tmp_path / "reports"
    directory.mkdir()
    endpoint = f"127.0.0.1:{free_port()}"
    processes = []
    for rank in range(size):
        place = {"SLURMD_NODENAME": f"n{rank}", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size)}
        environment = {**os.environ, **place, DIRECTORY: str(directory), OPTIONS: options}
        command = [sys.executable, "-m", "launch.health", str(tmp_path), endpoint]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert all(process.wait(120) == 0 for process in processes)
    return reports(directory, [f"n{rank}" for rank in range(size)])


@pytest.mark.usefixtures("processes")
def test_healthy_machines_sum_together(tmp_path: Path) -> None:
    assert look(tmp_path) == ({}, "")


@pytest.mark.usefixtures("processes")
def test_one_that_is_not_well_is_told_from_the_others(tmp_path: Path) -> None:
    found, _ = look(tmp_path, health='echo no GPU >&2; test "$SLURMD_NODENAME" != n1')
    assert list(found) == ["n1"] and "status 1: no GPU" in found["n1"]


@pytest.mark.usefixtures("processes")
def test_machines_without_their_gpus_are_not_well(tmp_path: Path) -> None:
    found, _ = look(tmp_path, size=1, gpus=8)
    assert "GPUs: 0 of 8 are seen" in found["n0"]


@pytest.mark.usefixtures("long")
def test_one_that_never_comes_is_the_one_that_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three machines wait for the third."""
    monkeypatch.setattr("launch.health.PATIENCE_S", 3)
    endpoint, said = f"127.0.0.1:{free_port()}", dict[int, tuple[str, list[int]]]()
    threads = [threading.Thread(target=lambda n=n: said.update({n: meet(endpoint, n, 3, "")})) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {rank for _, missing in said.values() for rank in missing} == {2}
    assert any(why.startswith("machines [2] of 3 did not come to") for why, _ in said.values())
    assert meet("127.0.0.1:1", 1, 2, "")[0].startswith("the machines do not reach each other at 127.0.0.1:1")


def test_reports_put_together(tmp_path: Path) -> None:
    def write(rank: int, why: str = "", together: str = "", missing: Sequence[int] = ()) -> None:
        said = {"rank": rank, "why": why, "together": together, "missing": list(missing)}
        (tmp_path / f"health-n{rank}.json").write_text(json.dumps(said))

    nodes = ["n0", "n1", "n2"]
    for rank in (0, 1):
        write(rank)
    assert reports(tmp_path, nodes) == ({"n2": "it did not report"}, "")
    (tmp_path / "health-n2.json").write_text("{")
    assert reports(tmp_path, nodes)[0] == {"n2": "it did not report"}
    # It cannot reach the others, which wait for it in vain.
    write(2, together="unreachable")
    for rank in (0, 1):
        write(rank, together="n2 did not come", missing=[2])
    assert reports(tmp_path, nodes) == ({"n2": "unreachable"}, "n2 did not come")
    for rank in range(3):
        write(rank, together="a sum is wrong")
    assert reports(tmp_path, nodes) == ({}, "a sum is wrong")
    write(0, why="disk: full")
    assert reports(tmp_path, nodes) == ({"n0": "disk: full"}, "")  # alone it explains the rest


def test_its_words_are_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    with pytest.raises(KeyError):
        main(["run", "host:1"])
