"""`accelerate launch` by our command; `tests/journeys/test_launchers.py` starts runs with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main


def test_its_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["accelerate", "--nproc", "2", "--dry-run"]) == 0
    words = capsys.readouterr().out.split()
    assert {"--num_processes=2", "--multi_gpu", "parallel=accelerate", "--mixed_precision=no"} <= set(words)
    assert main(["accelerate", "--dry-run", "--", "precision=bf16"]) == 0
    assert "--mixed_precision=bf16" in capsys.readouterr().out.split()
    (tmp_path / "a.yaml").write_text("")
    assert main(["accelerate", "--config-file", str(tmp_path / "a.yaml"), "--dry-run", "--", "parallel=fsdp"]) == 0
    words = capsys.readouterr().out.split()
    assert f"--config_file={tmp_path}/a.yaml" in words and "parallel=accelerate" not in words


def test_a_configuration_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accelerate", "--config-file", "nowhere"]) == 2
    assert "--config-file nowhere is not there" in capsys.readouterr().err


def test_flags_that_a_configuration_takes_the_place_of_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("")
    assert main(["accelerate", "--config-file", str(tmp_path / "a.yaml"), "--port=7"]) == 2
    assert "--port does not count beside --config-file" in capsys.readouterr().err
