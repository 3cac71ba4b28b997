"""One flush after the other: what is pinned meanwhile, and that giving up does not wait for a disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpointing.memory import flushing
from checkpointing.memory.flush import Nodes
from checkpointing.memory.flushing import Flusher, Task
from tests.harness.processes import wait_for


class Disk:
    """Takes its time until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.writing = threading.Event(), threading.Event()
        monkeypatch.setattr(flushing, "flush", self._flush)

    def _flush(self, *_: Any, check: Callable[[], None]) -> int:
        self.writing.set()
        while not self.go_on.wait(0.01):
            check()
        return 5


def task(root: Path, serial: int, name: str) -> Task:
    return Task(serial, name, root, root, 0, Nodes())


def test_one_after_the_other_and_pinned_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = Disk(monkeypatch), list[tuple[int, str, str]]()
    flusher = Flusher(lambda task, outcome: told.append((task.serial, task.generation, outcome["kind"])))
    flusher.submit(task(tmp_path, 1, "a"))
    flusher.submit(task(tmp_path, 3, "c"))
    assert flusher.pinned == {"a", "c"} and flusher.backlog == 2
    disk.go_on.set()
    wait_for(lambda: len(told) == 2)
    assert told == [(1, "a", "durable"), (3, "c", "durable")] and not flusher.pinned
    disk.go_on.clear()
    flusher.submit(task(tmp_path, 4, "d"))
    flusher.stop()
    assert len(told) == 2 and not any(thread.name == "flush" for thread in threading.enumerate())


def test_giving_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = Disk(monkeypatch), list[tuple[int, str]]()
    flusher = Flusher(lambda task, outcome: told.append((task.serial, outcome["kind"])))
    for serial in (1, 2, 3):
        flusher.submit(task(tmp_path, serial, str(serial)))
    assert disk.writing.wait(30)
    flusher.cancel(2)
    flusher.cancel(9)
    flusher.cancel(1)
    wait_for(lambda: told == [(1, "undurable"), (2, "undurable")])
    flusher.cancel()
    wait_for(lambda: told[2:] == [(3, "undurable")])
    flusher.stop()
