"""The command: its errors, its exit status, and who reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.__main__ import main
from tests.checkpointing.saved_run import output
from tests.harness.processes import ROOT


def test_an_error_is_an_object_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(tmp_path), "--json"]) == 2
    assert "holds no generation" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.usefixtures("processes")
def test_a_reader_that_has_read_enough_is_no_error(run_dir: Path) -> None:
    """As in `inspect ... | head -1`: here nobody reads at all."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "checkpointing", "inspect", str(run_dir)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(writing)
    assert done.stderr == "" and done.returncode == 1


@pytest.mark.parametrize("command", ["ls", "inspect", "verify"])
def test_a_directory_without_generations_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = output(capsys, command, tmp_path)
    assert status == 2 and "holds no generation" in text
    status, text = output(capsys, command, tmp_path / "absent")
    assert status == 2 and "is not a directory" in text
