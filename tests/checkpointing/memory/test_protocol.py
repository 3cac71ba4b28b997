"""What a message leads to: no rank waits alone, whatever order ranks speak, fail and die in."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing.codec import decode_manifest, encode_manifest
from checkpointing.format import Manifest, Writer
from checkpointing.memory import protocol as module
from checkpointing.memory.messages import VERSION, Message, ProtocolError
from checkpointing.memory.protocol import (
    CancelFlush,
    CommitArena,
    Effect,
    Flush,
    HangUp,
    KeeperProtocol,
    Reply,
    Session,
    StartAnew,
    TakeArena,
)

SECRET = "s" * 32


def hello(rank: int, ranks: int, **changes: Any) -> Message:
    return {
        "kind": "hello",
        "version": VERSION,
        "secret": SECRET,
        "session": "first",
        "incarnation": 1,
        "run_id": "r",
        "rank": rank,
        "ranks": list(range(ranks)),
        "nodes": [0, 1],
        "arenas": 3,
        "keep_s": 60,
        "durable": "/disk",
        "store": None,
        "rate": 0,
        "everywhere": 0,
        "lease": None,
    } | changes


def begin(serial: int) -> Message:
    return {"kind": "begin", "serial": serial, "everywhere": 0}


def prepared(serial: int, arena: str, rank: int, **more: Any) -> Message:
    told: Message = {"kind": "prepared", "serial": serial, "arena": arena, "writer": None}
    if rank == 0:
        head = {"step": serial, "save_id": f"{serial:032x}", "serial": serial}
        told |= {"manifest": head, "layout": "l", "durable": False}
    return told | more


@dataclass
class Node:
    """A node with a memory of so many arenas, whose commits of some serials fail."""

    ranks: int
    free: int = 99
    failing: frozenset[int] = frozenset()
    protocol: KeeperProtocol = field(default_factory=lambda: KeeperProtocol(SECRET, 7))
    told: list[tuple[int, Message]] = field(default_factory=list)  # connection, message
    done: list[Effect] = field(default_factory=list)
    connections: int = 0

    def connect(self, rank: int, **changes: Any) -> int:
        number = self.connections
        self.connections += 1
        self.protocol.opened(number)
        self.say(number, hello(rank, self.ranks, **changes))
        return number

    def say(self, connection: int, message: Message) -> list[Message]:
        """What this connection is told in answer to a message."""
        before = len(self.told)
        self.do(self.protocol.heard(connection, message))
        return [message for to, message in self.told[before:] if to == connection]

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.done.append(effect)
            if isinstance(effect, Reply):
                self.told.append((effect.to, effect.message))
            elif isinstance(effect, TakeArena):
                self.do(self.protocol.taken(effect, f"arena-{effect.serial}" if self.free > 0 else None))
            elif isinstance(effect, CommitArena):
                failed = effect.serial in self.failing
                self.do(
                    self.protocol.not_committed(effect.serial, OSError("full"))
                    if failed
                    else self.protocol.committed(effect, 10, 0)
                )

    def kinds(self, connection: int, serial: int) -> list[str]:
        return [m["kind"] for to, m in self.told if to == connection and m.get("serial") == serial]


def test_nothing_in_it_touches_the_machine() -> None:
    """It imports no file, socket, clock or thread."""
    tree = ast.parse(Path(module.__file__).read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    called = {getattr(node.func, "id", "") for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "open" not in called and "checkpointing.memory.flush" not in names
    assert not names & {"os", "socket", "time", "threading", "pathlib", "selectors", "subprocess", "logging", "shutil"}


def test_a_snapshot_is_committed_when_every_rank_has_finished_it() -> None:
    node = Node(2)
    first, second = node.connect(0), node.connect(1)
    assert [m["kind"] for m in node.say(first, begin(1))] == ["go"]
    assert node.say(second, begin(1)) == [{"kind": "go", "serial": 1, "arena": "arena-1"}]
    node.say(first, {"kind": "layout", "layout": "l", "text": '{"tensors":{}}'})
    assert not node.say(first, prepared(1, "arena-1", 0, durable=True))
    (told,) = node.say(second, prepared(1, "arena-1", 1))
    assert told == {
        "kind": "committed",
        "serial": 1,
        "generation": "step-00000001-00000000",
        "memory": 10,
        "backlog": 0,
    }
    assert node.kinds(first, 1) == ["go", "committed"]
    commit, flush = (next(e for e in node.done if isinstance(e, kind)) for kind in (CommitArena, Flush))
    assert isinstance(commit, CommitArena) and commit.arena == "arena-1" and commit.manifest.startswith(b'{"step":1')
    assert isinstance(flush, Flush) and (flush.generation, flush.session.durable) == (commit.generation, "/disk")
    node.do(node.protocol.flushed({"kind": "durable", "serial": 1}))
    assert node.told[-2:] == [(c, {"kind": "durable", "serial": 1}) for c in (first, second)]


def test_the_manifest_is_the_one_that_would_have_been_encoded_whole() -> None:
    from checkpointing.manifest_parts import encode_layout, head_of

    writer = Writer(0, 4096, 10, "a" * 32, "b" * 32, ((0, 65536),))
    manifest = Manifest(3, "c" * 32, "", "r", 1, 2, 1.5, 1, {"torch": "2"}, {"loss": 1.0}, [writer], {})
    node = Node(1)
    rank = node.connect(0)
    node.say(rank, begin(2))
    node.say(rank, {"kind": "layout", "layout": "l", "text": encode_layout(manifest)})
    record = {"rank": 0, "shard_bytes": 4096, "index_bytes": 10, "header": "a" * 32, "index": "b" * 32}
    record |= {"cover": [[0, 65536]]}
    node.say(rank, prepared(2, "arena-2", 0, manifest=head_of(manifest), writer=record))
    (commit,) = (e for e in node.done if isinstance(e, CommitArena))
    source = "manifest.json"
    assert decode_manifest(commit.manifest, source) == decode_manifest(encode_manifest(manifest), source) == manifest
    assert commit.files == writer.files


@pytest.mark.parametrize(
    "message",
    [hello(0, 2, secret="x"), hello(0, 2, version=VERSION + 1), begin(1), {"kind": "hello"}, hello(0, 2, nodes=None)],
    ids=["secret", "version", "no hello", "empty", "no nodes"],
)
def test_a_stranger_raises_and_changes_nothing(message: Message) -> None:
    node = Node(2)
    node.connect(0)
    session = node.protocol.session
    node.protocol.opened(99)
    with pytest.raises((ProtocolError, KeyError, TypeError)):
        node.protocol.heard(99, message)
    assert node.protocol.session is session and not node.protocol.closed(99)


def test_another_start_hangs_up_on_the_one_before_and_is_made_room_for() -> None:
    node = Node(1)
    old = node.connect(0)
    node.say(old, begin(1))
    before = len(node.done)
    new = node.connect(0, session="second", incarnation=2, run_id="another", everywhere=5)
    skipped, hung_up, cancelled, started, welcome = node.done[before:]
    assert isinstance(skipped, Reply) and skipped.message["why"] == "the trainer was started again"
    assert (hung_up, cancelled) == (HangUp(old), CancelFlush(None))  # in this order: it hears why
    assert isinstance(started, StartAnew) and (started.session.name, started.everywhere) == ("second", 5)
    assert isinstance(welcome, Reply) and welcome.to == new
    with pytest.raises(ProtocolError, match="before hello"):
        node.protocol.heard(old, begin(2))
    for left_over in ({"session": "first"}, {"session": "third", "incarnation": 1}):
        with pytest.raises(ProtocolError, match="left over"):
            node.connect(0, **left_over)
    before = len(node.done)
    node.connect(0, session="fourth", incarnation=2, run_id="another")
    assert not any(isinstance(e, CancelFlush) for e in node.done[before:])  # the same run: what is flushed goes on


def test_a_snapshot_without_an_arena_is_refused_to_all() -> None:
    node = Node(2, free=0)
    first, second = node.connect(0), node.connect(1)
    assert "every arena is in use" in node.say(first, begin(1))[0]["why"]
    node.free = 1
    assert node.say(second, begin(1))[0]["kind"] == "skipped"


def test_a_commit_that_lacks_a_part_is_told_to_all() -> None:
    node = Node(1)
    rank = node.connect(0)
    node.say(rank, begin(1))
    (told,) = node.say(rank, prepared(1, "arena-1", 0))  # and its layout was never sent
    assert told["kind"] == "skipped" and "could not be committed" in told["why"]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["begin", "prepare", "fail", "die", "leave", "return", "next"]), st.integers(0, 2)),
    max_size=60,
)


class Game:
    """Ranks that go through snapshots in step, as they do, and fail, die, leave and come back at any time."""

    def __init__(self, protocol: KeeperProtocol, ranks: int, failing: frozenset[int]) -> None:
        self.node, self.serial = Node(ranks, failing=failing, protocol=protocol), 1
        self.at: dict[int, int] = {}  # the connection of each rank that is there
        self.began, self.finished = set[int](), set[int]()
        self.hurt = set[int]()  # snapshots of which a rank will not finish its part
        self.asked: dict[tuple[int, int], int] = {}  # by connection and serial: what was told before is not heard
        for rank in range(ranks):
            self.come(rank)

    def come(self, rank: int) -> None:
        self.at[rank] = self.node.connect(rank)
        if rank == 0:
            self.node.say(self.at[0], {"kind": "layout", "layout": "l", "text": '{"tensors":{}}'})

    def go(self, rank: int) -> None:
        """The rank's connection breaks."""
        if self.copies(rank):
            self.hurt.add(self.serial)
        self.node.do(self.node.protocol.closed(self.at.pop(rank)))
        self.began.add(rank)  # it knows nothing of this snapshot when it is back

    def heard(self, connection: int, serial: int) -> list[str]:
        """What a rank hears of a snapshot, once it has asked for it."""
        if (connection, serial) not in self.asked:
            return []
        later = self.node.told[self.asked[connection, serial] :]
        return [m["kind"] for to, m in later if to == connection and m.get("serial") == serial]

    def copies(self, rank: int) -> bool:
        return self.heard(self.at[rank], self.serial) == ["go"] and rank not in self.finished

    def act(self, action: str, rank: int) -> None:
        node, serial = self.node, self.serial
        if action == "return" and rank not in self.at:
            self.come(rank)
        elif action == "next":  # ranks settle a snapshot together: all have an answer
            if all(self.heard(c, serial)[-1:] not in ([], ["go"]) for c in self.at.values()):
                self.serial, self.began, self.finished = serial + 1, set(), set()
        elif rank not in self.at:
            return
        elif action == "begin" and rank not in self.began:
            self.began.add(rank)
            self.asked[self.at[rank], serial] = len(node.told)
            away = set(range(node.ranks)) - self.at.keys() - self.finished
            (told,) = node.say(self.at[rank], begin(serial))
            assert not away or told["kind"] == "skipped", "it copies although a rank is away"
        elif action == "prepare" and self.copies(rank):
            self.finished.add(rank)
            node.say(self.at[rank], prepared(serial, f"arena-{serial}", rank))
        elif action == "fail" and self.copies(rank):
            self.finished.add(rank)
            self.hurt.add(serial)
            node.say(self.at[rank], {"kind": "failed", "serial": serial, "why": "a test"})
        elif action in ("die", "leave"):
            self.go(rank)
            if action == "die":
                self.come(rank)

    def judge(self) -> None:
        """Every rank hears one end, the same as the others, and none waits for a snapshot that will have none."""
        node = self.node
        for number in range(1, self.serial + 1):
            ends = {c: [k for k in self.heard(c, number) if k != "go"] for c in range(node.connections)}
            told = {kind for kinds in ends.values() for kind in kinds}
            assert len(told) < 2, f"snapshot {number} ended as {told}"
            commits = [e for e in node.done if isinstance(e, CommitArena) and e.serial == number]
            assert len(commits) <= 1 and not (commits and number in self.hurt)
            assert not commits or told == ({"skipped"} if number in node.failing else {"committed"})
            for connection in self.at.values():
                if "go" in self.heard(connection, number):
                    assert not told or set(ends[connection]) == told, f"{connection} does not hear that it {told}"
                    assert number not in self.hurt or ends[connection], f"{connection} waits for {number} without end"
                    assert ends[connection].count("committed") < 2


def play(protocol: KeeperProtocol, ranks: int, failing: frozenset[int], actions: list[tuple[str, int]]) -> None:
    game = Game(protocol, ranks, failing)
    for action, number in actions:
        game.act(action, number % ranks)
    game.judge()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.frozensets(st.integers(1, 4)), ACTIONS)
def test_no_rank_hears_another_end_than_the_others(
    ranks: int, failing: frozenset[int], actions: list[tuple[str, int]]
) -> None:
    play(KeeperProtocol(SECRET, 7), ranks, failing, actions)


class Forgetful(KeeperProtocol):
    """It forgets what it has refused."""

    @property
    def _refused(self) -> int:
        return 0

    @_refused.setter
    def _refused(self, value: int) -> None:
        pass


class TellsOne(KeeperProtocol):
    """It tells one rank, and not all."""

    def _tell(self, message: Message) -> list[Effect]:
        return super()._tell(message)[:1]


class Waits(KeeperProtocol):
    """It waits for a rank that has hung up."""

    def closed(self, connection: int) -> list[Effect]:
        self._rank_of.pop(connection, None)
        return []


class Deaf(KeeperProtocol):
    """It does not hear that a rank failed."""

    def heard(self, connection: int, message: Message) -> list[Effect]:
        return [] if message["kind"] == "failed" else super().heard(connection, message)


class Careless(KeeperProtocol):
    """It does not look who is there."""

    def _away(self, session: Session) -> list[int]:
        return []


class Hasty(KeeperProtocol):
    """It commits when the first rank has finished."""

    def _prepared(self, connection: int, rank: int, message: Message) -> list[Effect]:
        if self._filling is not None:
            self._filling.waiting.clear()
        return super()._prepared(connection, rank, message)


@pytest.mark.parametrize("broken", [Forgetful, TellsOne, Waits, Deaf, Careless, Hasty])
def test_control_a_protocol_that_is_broken_is_found_out(broken: type[KeeperProtocol]) -> None:
    draw = random.Random(1)
    kinds = ["begin", "begin", "begin", "prepare", "prepare", "prepare", "fail", "die", "leave", "return", "next"]
    for _ in range(400):
        actions = [(draw.choice(kinds), draw.randrange(3)) for _ in range(40)]
        play(KeeperProtocol(SECRET, 7), 3, frozenset({2}), actions)
        try:
            play(broken(SECRET, 7), 3, frozenset({2}), actions)
        except AssertionError:
            return
    raise RuntimeError(f"{broken.__name__} passes")
