"""The keeper's thread that flushes: one generation after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpointing.memory.flush import flush, open_durable
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import Nodes
from checkpointing.stores import load_store

logger = logging.getLogger("keeper")

STOP_S = 10.0  # a disk that hangs for longer does not keep the keeper from ending


@dataclass(frozen=True, slots=True)
class Task:
    """A generation in `memory` to be written to `durable`, at `rate` bytes a second or as fast as it goes (0)."""

    serial: int
    generation: str
    memory: Path
    durable: str  # a place, as `open_storage` takes it
    store: str | None  # the Python file of its store, where that is none of ours
    rate: float
    nodes: Nodes
    cancelled: threading.Event = field(default_factory=threading.Event)
    check: Callable[[], None] = lambda: None  # raises where it must not be committed


class Cancelled(Exception):
    """The generation that is being written is not wanted any more."""


class FlushQueue:
    """`done` is called in this thread with each task and what came of it."""

    def __init__(self, done: Callable[[Task, dict[str, Any]], None]) -> None:
        self._done = done
        self._tasks: list[Task] = []  # the first is being written
        self._changed = threading.Condition()
        self._stopping = threading.Event()
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

    def submit(self, task: Task) -> None:
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="flush", daemon=True)
            self._thread.start()

    def cancel(self, serial: int | None = None) -> None:
        """Give up one, or all: at its next look for the one that is being written."""
        with self._changed:
            for task in self._tasks:
                if serial in (None, task.serial):
                    task.cancelled.set()

    def stop(self) -> None:
        with self._changed:
            self._stopping.set()
            for task in self._tasks:
                task.cancelled.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._stopping.is_set())
                if self._stopping.is_set():
                    return
                task = self._tasks[0]
            outcome = self._flush(task)
            with self._changed:
                self._tasks.pop(0)
                if self._stopping.is_set():
                    return
            self._done(task, outcome)

    def _flush(self, task: Task) -> dict[str, Any]:
        def check() -> None:
            if task.cancelled.is_set():
                raise Cancelled("it was given up")

        def check_all() -> None:
            check()
            task.check()

        began = time.monotonic()
        try:
            if task.store is not None:
                load_store(Path(task.store))  # anew where it has changed: this process outlives the trainer
            check_all()
            memory = MappedStorage(task.memory)  # one of its own: its mappings go with the flush
            durable = open_durable(task.durable, task.rate, check)
            nbytes = flush(memory, durable, task.generation, task.nodes, check=check_all)
        except Exception as error:  # whatever it is, training goes on
            logger.warning("%s could not be flushed: %s", task.generation, error)
            return {"kind": "undurable", "why": f"{type(error).__name__}: {error}"}
        return {"kind": "durable", "seconds": time.monotonic() - began, "bytes": nbytes}
