"""The keeper's thread that flushes: one generation at a time, and at most one that waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpointing.memory.flush import Nodes, flush
from checkpointing.memory.mapped import MappedStorage
from checkpointing.storage import Storage

logger = logging.getLogger("keeper")


@dataclass(frozen=True, slots=True)
class Task:
    serial: int
    generation: str
    memory: MappedStorage
    durable: Storage
    nodes: Nodes


class Stopped(Exception):
    """The keeper ends."""


class Flusher:
    """`done` is called in this thread with the serial, the name and what came of each."""

    def __init__(self, done: Callable[[int, str, dict[str, Any]], None]) -> None:
        self._done = done
        self._tasks: list[Task] = []  # the first is being written
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def pinned(self) -> set[str]:
        """Generations whose arenas must stay as they are."""
        with self._changed:
            return {task.generation for task in self._tasks}

    @property
    def backlog(self) -> int:
        """How many generations are being written or wait for it."""
        return len(self._tasks)

    def submit(
        self, serial: int, generation: str, memory: MappedStorage, durable: Storage, nodes: Nodes, must: bool
    ) -> bool:
        """Whether it will be flushed: only if nothing else is, unless it must."""
        with self._changed:
            if self._tasks and not must:
                return False
            self._tasks.append(Task(serial, generation, memory, durable, nodes))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="flush", daemon=True)
            self._thread.start()
        return True

    def check(self) -> None:
        """Raise in the middle of a write where the keeper wants to end."""
        if self._stopping:
            raise Stopped

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._stopping)
                if self._stopping:
                    return
                task = self._tasks[0]
            began = time.monotonic()
            try:
                nbytes = flush(task.memory, task.durable, task.generation, task.nodes)
                outcome = {"kind": "durable", "seconds": time.monotonic() - began, "bytes": nbytes}
            except Stopped:
                return
            except Exception as error:  # whatever it is, training goes on
                logger.warning("%s could not be flushed: %s", task.generation, error)
                outcome = {"kind": "undurable", "why": f"{type(error).__name__}: {error}"}
            with self._changed:
                self._tasks.pop(0)
            self._done(task.serial, task.generation, outcome)
