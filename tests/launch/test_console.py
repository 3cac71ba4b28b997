"""The console command only dispatches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.console import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evershard", *arguments])
    return main()


def test_it_dispatches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "train", "nokey=1") == 2
    assert "There is no option nokey" in capsys.readouterr().err
    assert call(monkeypatch, "ckpt", "ls", str(tmp_path)) == 2
    assert "holds no generation" in capsys.readouterr().err
    assert call(monkeypatch, "launch", "local", "--dry-run") == 0
    assert "torch.distributed.run" in capsys.readouterr().out


def test_without_a_name_it_says_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch) == 2
    assert "usage: evershard train|ckpt|launch" in capsys.readouterr().err
