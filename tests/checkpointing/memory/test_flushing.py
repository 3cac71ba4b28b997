"""One flush at a time: what is pinned meanwhile, and that stopping does not wait for a disk."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import wait_for
from checkpointing.memory import flushing
from checkpointing.memory.flush import Nodes
from checkpointing.memory.flushing import Flusher
from checkpointing.memory.mapped import MappedStorage
from checkpointing.storage import FileStorage


def test_what_is_flushed_is_pinned_and_stopping_interrupts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, told = threading.Event(), list[tuple[int, str, str]]()
    flusher = Flusher(lambda serial, name, outcome: told.append((serial, name, outcome["kind"])))

    def slow(*_: Any) -> int:
        while not go_on.wait(0.01):
            flusher.check()
        return 5

    monkeypatch.setattr(flushing, "flush", slow)
    task = (MappedStorage(tmp_path), FileStorage(tmp_path), Nodes())
    assert flusher.submit(1, "a", *task, False)
    assert not flusher.submit(2, "b", *task, False)
    assert flusher.submit(3, "c", *task, True)
    assert flusher.pinned == {"a", "c"} and flusher.backlog == 2
    go_on.set()
    wait_for(lambda: not flusher.backlog)
    assert told == [(1, "a", "durable"), (3, "c", "durable")]
    go_on.clear()
    assert flusher.submit(4, "d", *task, False)
    flusher.stop()
    assert len(told) == 2 and not any(thread.name == "flush" for thread in threading.enumerate())
