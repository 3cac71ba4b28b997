"""A launcher that is gone is noticed; a shell or a scheduler is none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from checkpointing.lease import Holder
from tests.harness.processes import ROOT
from trainer.elastic import launcher
from trainer.elastic.launcher import LAUNCHER, find_launcher, this_launcher, watching

WAIT_S = 30.0


def test_who_started_a_process_lives_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {LAUNCHER: this_launcher()}
    lives = find_launcher(told)
    assert lives is not None and lives()
    gone = replace(Holder.this_process(), started="1")
    monkeypatch.setattr(Holder, "this_process", lambda: gone)
    lives = find_launcher({LAUNCHER: this_launcher()})
    assert lives is not None and not lives()


@pytest.mark.parametrize("told", ["", "{", "[]", "{}", '{"pid": 1}'])
def test_where_none_is_known_nobody_is_watched(told: str) -> None:
    assert find_launcher({}) is None and find_launcher({LAUNCHER: told}) is None


def test_of_another_machine_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(Holder.this_process(), host="another", started="1")
    monkeypatch.setattr(Holder, "this_process", lambda: other)
    assert find_launcher({LAUNCHER: this_launcher()}) is None


def test_torchrun_is_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 77)
    lives = find_launcher({"TORCHELASTIC_RUN_ID": "x"})
    assert lives is not None and lives()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not lives() and find_launcher({"TORCHELASTIC_RUN_ID": "x"}) is None


@pytest.mark.usefixtures("processes")
def test_one_that_is_killed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LOOK_S", 0.02)
    code = "from trainer.elastic.launcher import this_launcher; print(this_launcher(), flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as started:
        assert started.stdout is not None
        told, gone, said = {LAUNCHER: started.stdout.readline()}, threading.Event(), list[str]()
        with watching(lambda: said.append("gone"), gone.set, told):
            assert not gone.wait(0.2)
            started.kill()
            assert gone.wait(WAIT_S)
        assert said == ["gone"]


def test_a_run_that_ends_before_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LOOK_S", 60.0)
    with watching(lambda: pytest.fail("it lives"), lambda: pytest.fail("it lives"), {LAUNCHER: this_launcher()}):
        pass
    assert "launcher" not in [thread.name for thread in threading.enumerate()]


def test_a_process_that_leaves_with_others_before_it_looks_says_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "LOOK_S", 60.0)
    said, lives = list[str](), [True]
    monkeypatch.setattr(launcher, "find_launcher", lambda environment: lambda: lives[0])
    with watching(lambda: said.append("gone"), lambda: pytest.fail("it leaves already")):
        lives[0] = False
    assert said == ["gone"]
