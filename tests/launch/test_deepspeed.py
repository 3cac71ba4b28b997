"""The `deepspeed` launcher by our command; `tests/journeys/test_launchers.py` starts runs with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main


def test_its_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["deepspeed", "--nproc", "2", "--port", "29511", "--dry-run"]) == 0
    words = capsys.readouterr().out.split()
    assert {"--num_gpus=2", "--no_local_rank", "--master_port=29511", "parallel=zero2"} <= set(words)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    assert main(["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--dry-run", "--", "parallel=zero3"]) == 0
    words = capsys.readouterr().out.split()
    assert f"--hostfile={tmp_path}/hosts" in words and "parallel=zero2" not in words and "--num_gpus" not in str(words)


def test_two_at_a_time_meet_at_ports_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One port would make one world of both jobs."""
    ports = set()
    for pid in (4711, 4712):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        assert main(["deepspeed", "--nproc", "2", "--dry-run"]) == 0
        ports |= {word for word in capsys.readouterr().out.split() if word.startswith("--master_port=")}
    assert len(ports) == 2
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    assert main(["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--dry-run"]) == 0
    assert "--master_port=29500" in capsys.readouterr().out


def test_a_hostfile_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deepspeed", "--hostfile", "nowhere"]) == 2
    assert "--hostfile nowhere is not there" in capsys.readouterr().err


def test_flags_that_a_hostfile_takes_the_place_of_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    assert main(["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--nproc=2"]) == 2
    assert "--nproc does not count beside --hostfile" in capsys.readouterr().err
