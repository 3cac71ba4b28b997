"""The keeper's side of its protocol: a message in, replies and effects out. No file, socket, clock or thread in here.

Ranks fill the arena that they are given, each its own file, and say when they are done. A snapshot is committed when
every rank of the node has finished it, and every rank hears the same of it: none waits alone. `docs/keeper.md` lists
the messages; `keeper.py` is the process that carries effects out, in their order.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpointing.format import Writer, generation_name, shard_name
from checkpointing.manifest_parts import join_manifest
from checkpointing.memory.messages import VERSION, Message, Nodes, ProtocolError


@dataclass(frozen=True, slots=True)
class Session:
    """One start of the trainer, as its ranks tell it."""

    name: str
    incarnation: int
    run_id: str
    ranks: list[int]  # of this node
    nodes: Nodes
    arenas: int
    keep_s: float
    durable: str | None  # the place to flush to
    store: str | None  # the Python file of its store, where that is none of ours
    rate: float  # bytes a second; 0: as fast as it goes
    lease: list[Any] | None  # directory, number and claim

    @staticmethod
    def of(message: Message) -> Session:
        return Session(
            str(message["session"]),
            int(message["incarnation"]),
            str(message["run_id"]),
            [int(rank) for rank in message["ranks"]],
            Nodes(*message["nodes"]),
            int(message["arenas"]),
            float(message["keep_s"]),
            message["durable"],
            message["store"],
            float(message["rate"]),
            message["lease"],
        )


# Effects. `to` is the number of a connection.


@dataclass(frozen=True, slots=True)
class Reply:
    """Send a message."""

    to: int
    message: Message


@dataclass(frozen=True, slots=True)
class HangUp:
    """Close a connection, which is not listened to any more."""

    to: int


@dataclass(frozen=True, slots=True)
class StartAnew:
    """Make the memory ready for another start of the trainer; `everywhere` is its last serial on all nodes, or 0."""

    session: Session
    everywhere: int


@dataclass(frozen=True, slots=True)
class TakeArena:
    """Find an arena that these files may be written into, and answer with `taken`."""

    to: int
    serial: int
    everywhere: int
    arenas: int
    files: frozenset[str]


@dataclass(frozen=True, slots=True)
class CommitArena:
    """Make a filled arena a generation, and answer with `committed` or `not_committed`."""

    serial: int
    arena: str
    generation: str
    manifest: bytes
    files: Mapping[str, int]
    durable: bool


@dataclass(frozen=True, slots=True)
class Flush:
    """Write a committed generation to the session's durable place, and answer with `flushed`."""

    serial: int
    generation: str
    session: Session


@dataclass(frozen=True, slots=True)
class CancelFlush:
    """Give up the flush of one serial, or of all (None)."""

    serial: int | None


Effect = Reply | HangUp | StartAnew | TakeArena | CommitArena | Flush | CancelFlush


@dataclass
class Filling:
    """A snapshot that the ranks of this node are copying."""

    serial: int
    arena: str
    waiting: set[int]  # ranks that have not finished
    writers: dict[int, dict[str, Any]] = field(default_factory=dict)
    head: dict[str, Any] | None = None  # of its manifest, from the first rank
    layout: str = ""
    durable: bool = False


class KeeperProtocol:
    """The state of a node's keeper between messages, for connections that the caller numbers.

    Every method returns the effects to carry out. `heard` raises `ProtocolError`, or another exception for a message
    that is malformed: the connection it came from is to be closed then, and no other.
    """

    def __init__(self, secret: str, pid: int) -> None:
        self._secret, self._pid = secret, pid
        self.session: Session | None = None
        self._past: set[str] = set()  # names of sessions that another one followed
        self._rank_of: dict[int, int | None] = {}  # by connection; None before its hello
        self._filling: Filling | None = None
        self._refused = 0  # the last serial that will not be committed: whoever asks for it later hears that too
        self._layouts: dict[str, str] = {}

    def opened(self, connection: int) -> None:
        """Listen to another connection."""
        self._rank_of[connection] = None

    def closed(self, connection: int) -> list[Effect]:
        """Forget a connection: a rank that was still copying will not finish."""
        rank = self._rank_of.pop(connection, None)
        if self._filling is not None and rank in self._filling.waiting:
            return self._drop(f"rank {rank} hung up")
        return []

    def heard(self, connection: int, message: Message) -> list[Effect]:
        """Take a message of a connection."""
        kind = message["kind"]
        rank = self._rank_of[connection]
        if rank is None:
            if kind != "hello":
                raise ProtocolError(f"{kind} came before hello")
            return self._hello(connection, message)
        if kind == "layout":
            self._layouts = {message["layout"]: message["text"]}
            return []
        if kind == "begin":
            return self._begin(connection, message["serial"], message["everywhere"])
        if kind == "prepared":
            return self._prepared(connection, rank, message)
        if kind == "failed":
            if self._filling is not None and self._filling.serial == message["serial"]:
                return self._drop(f"rank {rank}: {message['why']}")
            return []
        if kind == "cancel":
            return [CancelFlush(message["serial"])]
        raise ProtocolError(f"{kind} is no message")

    def _hello(self, connection: int, message: Message) -> list[Effect]:
        if message["version"] != VERSION or not secrets.compare_digest(str(message["secret"]), self._secret):
            raise ProtocolError("another version, or not of this run")
        told, current, everywhere = Session.of(message), self.session, int(message["everywhere"])
        rank = int(message["rank"])
        effects: list[Effect] = []
        if current is None or current.name != told.name:
            if told.name in self._past or (current is not None and told.incarnation < current.incarnation):
                raise ProtocolError("it is left over from a start that another one followed")
            effects = self._start(told, everywhere)
        self._rank_of[connection] = rank
        return [*effects, Reply(connection, {"kind": "welcome", "version": VERSION, "pid": self._pid})]

    def _start(self, session: Session, everywhere: int) -> list[Effect]:
        """The trainer was started again: whoever is left of earlier starts is not listened to any more."""
        effects = self._drop("the trainer was started again")
        for connection, rank in self._rank_of.items():
            if rank is not None:
                effects.append(HangUp(connection))
                self._rank_of[connection] = None
        if (last := self.session) is not None:
            self._past.add(last.name)
            if (last.run_id, last.nodes) != (session.run_id, session.nodes):
                effects.append(CancelFlush(None))  # of another run, or together with nodes that may not be there
        self.session, self._refused = session, 0
        return [*effects, StartAnew(session, everywhere)]

    def _begin(self, connection: int, serial: int, everywhere: int) -> list[Effect]:
        filling = self._filling
        if filling is not None and filling.serial == serial:
            return [Reply(connection, {"kind": "go", "serial": serial, "arena": filling.arena})]
        session = self.session
        assert session is not None
        effects = self._drop("not all ranks finished it before the next one")
        if serial <= self._refused:
            why = "another rank of this node was not ready for it"
        elif away := self._away(session):
            why = f"rank {away[0]} has not found the keeper yet"
        else:
            files = frozenset(shard_name(rank) for rank in session.ranks)
            return [*effects, TakeArena(connection, serial, everywhere, session.arenas, files)]
        return [*effects, self._refuse(connection, serial, why)]

    def _away(self, session: Session) -> list[int]:
        """The ranks of this node that are not connected."""
        return sorted(set(session.ranks) - {rank for rank in self._rank_of.values() if rank is not None})

    def taken(self, asked: TakeArena, arena: str | None) -> list[Effect]:
        """Go on with the arena that was asked for; None where none is free."""
        if arena is None:
            why = "every arena is in use: older snapshots are still being flushed or read"
            return [self._refuse(asked.to, asked.serial, why)]
        assert self.session is not None
        self._filling = Filling(asked.serial, arena, set(self.session.ranks))
        return [Reply(asked.to, {"kind": "go", "serial": asked.serial, "arena": arena})]

    def _refuse(self, connection: int, serial: int, why: str) -> Reply:
        self._refused = max(self._refused, serial)
        return Reply(connection, {"kind": "skipped", "serial": serial, "why": why})

    def _prepared(self, connection: int, rank: int, message: Message) -> list[Effect]:
        filling = self._filling
        if filling is None or filling.serial != message["serial"] or filling.arena != message["arena"]:
            why = "the keeper was started again meanwhile"
            return [Reply(connection, {"kind": "skipped", "serial": message["serial"], "why": why})]
        filling.waiting.discard(rank)
        if message["writer"] is not None:
            filling.writers[rank] = message["writer"]
        if message.get("manifest") is not None:
            filling.head, filling.layout = message["manifest"], message["layout"]
            filling.durable = message["durable"]
        if filling.waiting:
            return []
        self._filling = None
        try:
            return [self._as_commit(filling)]
        except Exception as error:  # whatever a rank has left out, all must hear of it
            return self.not_committed(filling.serial, error)

    def _as_commit(self, filling: Filling) -> CommitArena:
        head = filling.head
        assert head is not None, "no rank sent a manifest"
        writers = [filling.writers[rank] for rank in sorted(filling.writers)]
        return CommitArena(
            filling.serial,
            filling.arena,
            generation_name(head["step"], head["save_id"]),
            join_manifest(head, writers, self._layouts[filling.layout]),
            {file: nbytes for writer in writers for file, nbytes in Writer.of(writer).files.items()},
            filling.durable,
        )

    def committed(self, commit: CommitArena, nbytes: int, backlog: int) -> list[Effect]:
        """Tell that an arena is a generation now.

        The run takes `nbytes` of memory on this node, and `backlog` generations wait to become durable.
        """
        told = {"generation": commit.generation, "memory": nbytes, "backlog": backlog}
        effects = self._tell({"kind": "committed", "serial": commit.serial, **told})
        if commit.durable and self.session is not None and self.session.durable is not None:
            effects.append(Flush(commit.serial, commit.generation, self.session))
        return effects

    def not_committed(self, serial: int, error: Exception) -> list[Effect]:
        """Tell that an arena could not become a generation."""
        return self._tell({"kind": "skipped", "serial": serial, "why": f"it could not be committed: {error!r}"})

    def flushed(self, outcome: Message) -> list[Effect]:
        """Tell what became of a flush: its serial and generation, and that it is durable, or why it is not."""
        return self._tell(outcome)

    def _drop(self, why: str) -> list[Effect]:
        """Forget the snapshot that is being filled."""
        if (filling := self._filling) is None:
            return []
        self._filling = None
        self._refused = max(self._refused, filling.serial)
        return self._tell({"kind": "skipped", "serial": filling.serial, "why": why})

    def _tell(self, message: Message) -> list[Effect]:
        return [Reply(connection, message) for connection, rank in self._rank_of.items() if rank is not None]
