"""Durable writes that are pending: generations on their way to the disk, and how each ended."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from checkpointing.memory.messages import Message


@dataclass(slots=True)
class Durable:
    """How the writing of a generation ended."""

    step: int
    generation: str = ""
    seconds: float = 0.0
    nbytes: int = 0
    why: str = ""


class PendingWrites:
    """Durable writes that are pending on one rank, as its keeper tells them. Any thread may ask."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}  # of those on their way, by serial
        self._found: list[Durable] = []
        self._failed: set[int] = set()
        self._changed = threading.Condition()

    def expect(self, serial: int, step: int) -> None:
        with self._changed:
            self._steps[serial] = step

    def forget(self, serial: int) -> bool:
        """Forget a write whose snapshot was not even committed; whether it was expected."""
        with self._changed:
            known = self._steps.pop(serial, None) is not None
            self._changed.notify_all()
            return known

    def fail(self, step: int, why: str) -> None:
        """One that was not even begun."""
        with self._changed:
            self._found.append(Durable(step, why=why))

    def heard(self, message: Message) -> None:
        with self._changed:
            if (step := self._steps.pop(message["serial"], None)) is None:
                return
            if message["kind"] == "durable":
                self._found.append(Durable(step, message["generation"], message["seconds"], message["bytes"]))
            else:
                self._found.append(Durable(step, why=message["why"]))
                self._failed.add(message["serial"])
            self._changed.notify_all()

    def lose(self, why: str) -> None:
        """All that are on their way, as their keeper is gone."""
        with self._changed:
            self._found += [Durable(step, why=why) for step in self._steps.values()]
            self._failed |= self._steps.keys()
            self._steps.clear()
            self._changed.notify_all()

    def state(self) -> tuple[list[int], list[int]]:
        """Serials that are on their way, and those that failed since the last call."""
        with self._changed:
            failed, self._failed = self._failed, set()
            return sorted(self._steps), sorted(failed)

    def take(self) -> list[Durable]:
        """Take the writes that ended since the last call, well or not."""
        with self._changed:
            found, self._found = self._found, []
            return found

    def wait(self, seconds: float) -> bool:
        """Whether nothing is on its way any more, after at most so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._steps, seconds)
