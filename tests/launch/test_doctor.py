"""The doctor's report, and its status."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.doctor import ENDPOINT, TOKEN
from launch.doctor import main as doctor
from tests.harness.ports import free_port


def test_a_machine_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "lock limit" in said and "MEND" not in said


def test_one_that_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--dir", str(tmp_path / "file")]) == 1
    assert "MEND  disk" in capsys.readouterr().out


def test_an_allocation_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["doctor", "--allocation"]) == 2
    assert "this is no SLURM job" in capsys.readouterr().err
    task = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", ENDPOINT: f"127.0.0.1:{free_port()}", TOKEN: "1"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    assert doctor(argparse.Namespace(dir=str(tmp_path), allocation=True)) == 0
    assert "sum together" in capsys.readouterr().out
