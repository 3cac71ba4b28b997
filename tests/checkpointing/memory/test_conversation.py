"""What a rank hears from its keeper changes the snapshot under way, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpointing.memory.conversation import Conversation
from checkpointing.memory.messages import Message


class Fixed:
    """A snapshot as a conversation sees it."""

    def __init__(self, serial: int) -> None:
        import threading

        self.serial, self.arena, self.why, self.generation = serial, "", "", ""
        self.told: Message = {}
        self.answered, self.settled = threading.Event(), threading.Event()

    def fail(self, why: str) -> None:
        self.why = self.why or why
        self.answered.set()
        self.settled.set()


@pytest.fixture
def conversation(tmp_path: Path) -> Any:
    found: Any = Conversation(tmp_path, {"kind": "hello", "everywhere": 0}, starts=False, keep_s=60)
    found.current = Fixed(4)
    return found


def test_an_answer_reaches_the_snapshot_it_is_for(conversation: Any) -> None:
    conversation._heard({"kind": "go", "serial": 3, "arena": "arena-9"})
    assert not conversation.current.answered.is_set()  # it is of the one before
    conversation._heard({"kind": "go", "serial": 4, "arena": "arena-1"})
    assert conversation.current.answered.is_set() and conversation.current.arena == "arena-1"
    conversation._heard({"kind": "committed", "serial": 4, "generation": "g", "memory": 1})
    assert conversation.current.settled.is_set() and conversation.current.generation == "g"


def test_a_keeper_that_skips_or_is_lost_is_sent_the_layout_again(conversation: Any) -> None:
    for loses in (lambda: conversation._heard({"kind": "skipped", "serial": 4, "why": "a"}), conversation._lost):
        conversation.known_layout = "l"
        loses()
        assert not conversation.known_layout and conversation.current.why == "a"  # the first reason stays


def test_what_a_lost_keeper_was_to_make_durable_has_failed(conversation: Any) -> None:
    conversation.durables.expect(4, step=7)
    conversation._lost()
    (ended,) = conversation.durables.take()
    assert ended.step == 7 and "went away" in ended.why


def test_a_cancel_that_found_no_keeper_is_sent_to_the_next_one(conversation: Any) -> None:
    sent: list[Message] = []
    conversation.client.send = lambda message: False
    conversation.cancel(2)
    conversation.client.send = lambda message: sent.append(message) or True
    for _ in range(2):
        conversation._heard({"kind": "welcome", "version": 3, "pid": 5})
    assert sent == [{"kind": "cancel", "serial": 2}] and conversation.keeper_pid == 5


def test_the_next_keeper_is_told_what_all_nodes_have(conversation: Any) -> None:
    conversation.committed_everywhere(4)
    assert conversation._greeting["everywhere"] == 4
