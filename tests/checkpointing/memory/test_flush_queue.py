"""One flush after the other: what is pinned meanwhile, and that giving up does not wait for a disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpointing.memory import flush_queue
from checkpointing.memory.flush_queue import FlushQueue, Task
from checkpointing.memory.messages import Nodes
from tests.harness.processes import wait_for


class Disk:
    """Takes its time until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.writing = threading.Event(), threading.Event()
        monkeypatch.setattr(flush_queue, "flush", self._flush)

    def _flush(self, *_: Any, check: Callable[[], None]) -> int:
        self.writing.set()
        while not self.go_on.wait(0.01):
            check()
        return 5


def task(root: Path, serial: int, name: str) -> Task:
    return Task(serial, name, root, str(root), None, 0, Nodes())


def test_one_after_the_other_and_pinned_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = Disk(monkeypatch), list[tuple[int, str, str]]()
    queue = FlushQueue(lambda task, outcome: told.append((task.serial, task.generation, outcome["kind"])))
    queue.submit(task(tmp_path, 1, "a"))
    queue.submit(task(tmp_path, 3, "c"))
    assert queue.pinned == {"a", "c"} and queue.backlog == 2
    disk.go_on.set()
    wait_for(lambda: len(told) == 2)
    assert told == [(1, "a", "durable"), (3, "c", "durable")] and not queue.pinned
    disk.go_on.clear()
    queue.submit(task(tmp_path, 4, "d"))
    queue.stop()
    assert len(told) == 2 and not any(thread.name == "flush" for thread in threading.enumerate())


def test_giving_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = Disk(monkeypatch), list[tuple[int, str]]()
    queue = FlushQueue(lambda task, outcome: told.append((task.serial, outcome["kind"])))
    for serial in (1, 2, 3):
        queue.submit(task(tmp_path, serial, str(serial)))
    assert disk.writing.wait(30)
    queue.cancel(2)
    queue.cancel(9)
    queue.cancel(1)
    wait_for(lambda: told == [(1, "undurable"), (2, "undurable")])
    queue.cancel()
    wait_for(lambda: told[2:] == [(3, "undurable")])
    queue.stop()
