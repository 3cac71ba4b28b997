"""`ls`: the table of generations, and that it waits for no tensor library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import checkpointing
from tests.checkpointing.saved_run import generation, output
from tests.harness.processes import ROOT


def test_ls_lists_the_newest_first(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (generation(run_dir, 10) / "COMMIT").unlink()
    for directory in (run_dir, run_dir / "checkpoints"):
        status, text = output(capsys, "ls", directory)
        rows = text.splitlines()[1:]
        assert status == 0
        assert [row.split()[1] for row in rows] == ["20", "10"]
        assert rows[0].endswith("committed") and rows[1].endswith("not committed")
    status, text = output(capsys, "ls", run_dir, "--json")
    assert [g["state"] for g in json.loads(text)["generations"]] == ["committed", "not committed"]


@pytest.mark.usefixtures("processes")
def test_listing_imports_no_torch_and_reading_does(run_dir: Path) -> None:
    """Of thousands of generations the import would take longer than all else."""
    program = "import sys; from checkpointing.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for command, imported in (("ls", "False"), ("inspect", "True")):
        line = [sys.executable, "-c", program, command, str(run_dir)]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
        assert done.stdout.splitlines()[-1] == imported, command


def test_every_public_name_is_found_when_it_is_asked_for() -> None:
    for name in checkpointing.__all__:
        found = getattr(checkpointing, name)
        if callable(found) and not hasattr(found, "__origin__"):  # no constant, and no alias
            assert found.__name__ == name and found.__module__.startswith("checkpointing."), name
    assert set(checkpointing.__all__) <= set(dir(checkpointing))
    with pytest.raises(AttributeError, match="has no attribute 'sav'"):
        checkpointing.sav  # type: ignore[attr-defined]  # noqa: B018
