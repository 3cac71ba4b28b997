"""One rank's conversation with its node's keeper: what it hears changes the snapshot under way and the durable writes.

The client's thread calls `_heard` and `_lost`; the run's thread and the one that copies send, and wait for the events
of the snapshot.
"""

from __future__ import annotations

from pathlib import Path

from checkpointing.memory.client import Client
from checkpointing.memory.messages import Message
from checkpointing.memory.pending_writes import PendingWrites
from checkpointing.memory.snapshot import Snapshot


class Conversation:
    """`greeting` is sent first to every keeper; the rank that starts keepers (`starts`) starts another when it dies."""

    def __init__(self, memory: Path, greeting: Message, *, starts: bool, keep_s: float) -> None:
        self.current: Snapshot | None = None
        self.durables = PendingWrites()
        self.keeper_pid = 0
        self.known_layout = ""  # the digest of the layout that the keeper has been sent
        self._greeting = greeting
        self._uncancelled: set[int] = set()  # serials that no keeper has been told to give up
        self.client = Client(memory, greeting, self._heard, starts=starts, keep_s=keep_s, lost=self._lost)

    def wait(self, seconds: float) -> bool:
        """Wait until a keeper has said welcome; whether one did."""
        return self.client.connected.wait(seconds)

    def cancel(self, serial: int) -> None:
        """Have the keeper give up what it is to make durable: now, or when it is there again."""
        if not self.client.send({"kind": "cancel", "serial": serial}):
            self._uncancelled.add(serial)

    def committed_everywhere(self, serial: int) -> None:
        """Remember the newest serial that all nodes have, for a keeper that is started anew."""
        self._greeting["everywhere"] = serial

    def _heard(self, message: Message) -> None:
        kind, serial = message["kind"], message.get("serial", -1)
        if kind == "welcome":
            self.keeper_pid = message["pid"]
            for uncancelled in list(self._uncancelled):
                if self.client.send({"kind": "cancel", "serial": uncancelled}):
                    self._uncancelled.discard(uncancelled)
        elif kind in ("durable", "undurable"):
            self.durables.heard(message)
        elif (snapshot := self.current) is not None and snapshot.serial == serial:
            if kind == "go":
                snapshot.arena = message["arena"]
                snapshot.answered.set()
            elif kind == "skipped":
                self.known_layout = ""  # the keeper may be one that does not know it
                snapshot.fail(message["why"])
            elif kind == "committed":
                snapshot.generation, snapshot.told = message["generation"], message
                snapshot.settled.set()

    def _lost(self) -> None:
        """Whatever the keeper had been told is forgotten with it."""
        self.known_layout = ""
        why = "the keeper went away, and is started again"
        if (snapshot := self.current) is not None and not snapshot.settled.is_set():
            snapshot.fail(why)
        self.durables.lose(why)
