"""The saves of a crash campaign: what they hold, how they are broken, and that none outlives its time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import crash_ranks
from benchmarks.crash_ranks import (
    COMMIT_FIRST,
    NEW,
    OLD,
    SOUND,
    objects,
    pieces,
    record,
    save_step,
    state,
    why_no_strace,
    without_sync,
)
from checkpointing import load
from tests.harness.processes import alive, wait_for
from tests.harness.threads import ThreadTeam, all_of, on_ranks


@pytest.mark.parametrize("case", [SOUND, COMMIT_FIRST])
def test_every_case_ends_in_the_whole_state(tmp_path: Path, case: str) -> None:
    def work(team: ThreadTeam) -> None:
        save_step(NEW, tmp_path, team, case)

    all_of(on_ranks(2, work))
    target = {name: torch.zeros_like(tensor) for name, tensor in state(OLD).items()}
    assert load(tmp_path, pieces(target, 0, 1)) == objects(NEW)
    assert all(torch.equal(target[name], tensor) for name, tensor in state(NEW).items())


def test_the_two_steps_have_nothing_in_common() -> None:
    old, new = state(OLD), state(NEW)
    assert all(not torch.equal(old[name], new[name]) for name in old)
    assert objects(OLD) != objects(NEW)
    assert sorted(piece.tensor.nbytes for piece in pieces(new, 0, 2))[-2:] == [72_000, 300_000]


def test_syncs_come_back() -> None:
    before = os.fsync, os.fdatasync
    with pytest.raises(KeyError), without_sync():
        os.fsync(-1)
        raise KeyError
    assert (os.fsync, os.fdatasync) == before


def stand_in(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Something else under the name of strace."""
    directory.mkdir()
    (directory / "strace").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "strace").chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)


@pytest.mark.usefixtures("processes")
def test_a_rank_that_fails_ends_the_recording_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "bin", monkeypatch, "echo no such luck >&2; exit 3")
    assert why_no_strace() == "strace does not work here: no such luck"
    with pytest.raises(RuntimeError, match="rank 0 ended with 3:\nno such luck"):
        record(tmp_path / "top", 2, [SOUND])


@pytest.mark.usefixtures("processes")
def test_a_rank_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "bin", monkeypatch, f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    monkeypatch.setattr(crash_ranks, "WAIT_S", 1)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 0 ended with -9"):
        record(tmp_path / "top", 1, [SOUND])
    assert time.monotonic() - began < 20
    sleeper = int((tmp_path / "pid").read_text())
    wait_for(lambda: not alive(sleeper), 20)


def test_without_strace_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert why_no_strace() == "strace is not installed"
