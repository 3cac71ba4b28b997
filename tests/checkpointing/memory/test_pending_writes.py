"""What a rank knows of generations on their way to the disk."""

from __future__ import annotations

import threading

from checkpointing.memory.pending_writes import Durable, PendingWrites


def test_what_became_of_each() -> None:
    durables = PendingWrites()
    for serial in (1, 2, 3, 4):
        durables.expect(serial, 10 * serial)
    durables.fail(50, "busy")
    durables.heard({"kind": "durable", "serial": 1, "generation": "g", "seconds": 0.5, "bytes": 7})
    durables.heard({"kind": "undurable", "serial": 2, "generation": "h", "why": "full"})
    durables.heard({"kind": "durable", "serial": 9, "generation": "x", "seconds": 0.5, "bytes": 7})  # nobody asked
    assert durables.forget(3) and not durables.forget(3)
    assert durables.take() == [Durable(50, why="busy"), Durable(10, "g", 0.5, 7), Durable(20, why="full")]
    assert durables.take() == []
    assert durables.state() == ([4], [2])
    assert durables.state() == ([4], [])
    durables.lose("gone")
    assert durables.take() == [Durable(40, why="gone")]
    assert durables.state() == ([], [4])


def test_waiting_ends_when_nothing_is_on_its_way() -> None:
    durables = PendingWrites()
    assert durables.wait(0)
    durables.expect(1, 1)
    assert not durables.wait(0.01)
    timer = threading.Timer(0.05, durables.lose, ["gone"])
    timer.start()
    assert durables.wait(30)
    timer.join()
