"""A command is what a shell makes of its text."""

from __future__ import annotations

import os
import shlex

import pytest

from launch.command import ROOT, TRAINER, Command, python, threads


def test_it_can_be_typed() -> None:
    command = Command(python("-m", "x", "run.name=a b", "it's"), {"A": "1 2", "B": "c"})
    words = shlex.split(str(command))
    assert words[:2] == ["A=1 2", "B=c"] and words[2:] == list(command.words)


def test_the_trainer_is_named_by_its_path() -> None:
    assert TRAINER.is_file() and TRAINER.parents[1] == ROOT


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [threads(n)["OMP_NUM_THREADS"] for n in (1, 2, 3, 8, 9)] == ["8", "4", "2", "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(2)["OMP_NUM_THREADS"] == "5"
