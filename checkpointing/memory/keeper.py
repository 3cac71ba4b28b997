"""The keeper: one process per node that outlives the trainer. It commits, keeps and flushes what ranks copy to memory.

Ranks fill the arena they are given, each its own file, and say when they are done. Nothing that matters is in this
process alone: started again, it finds everything on the tmpfs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpointing.errors import LeaseHeldError
from checkpointing.format import Writer, generation_name, shard_name
from checkpointing.lease import still_holds
from checkpointing.memory.directory import (
    FINISHED,
    KEEP_S,
    RELEASE,
    clear_forgotten,
    has_living_starts,
    keeper_lock,
    make_directory,
    remove,
    write_keep_s,
)
from checkpointing.memory.flush import Nodes
from checkpointing.memory.flushing import Flusher, Task
from checkpointing.memory.messages import VERSION, Lines, Message, ProtocolError, encode, is_same_user, listen
from checkpointing.memory.shelf import Shelf
from checkpointing.storage import FileStorage

logger = logging.getLogger("keeper")

EMPTY_S = 120.0  # how long it waits for a trainer where there is nothing to keep


@dataclass
class Filling:
    """A snapshot that the ranks of this node are copying."""

    serial: int
    arena: str
    waiting: set[int]  # ranks that have not finished
    writers: dict[int, dict[str, Any]] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None  # without writers and layout: the first rank's
    layout: str = ""
    durable: bool = False


@dataclass
class Session:
    """One start of the trainer, as its ranks tell it."""

    name: str
    incarnation: int
    run_id: str
    ranks: list[int]
    nodes: Nodes
    arenas: int
    keep_s: float
    durable: str | None
    rate: float
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
            float(message["rate"]),
            message["lease"],
        )


class Connection:
    def __init__(self, endpoint: socket.socket) -> None:
        self.socket, self.lines = endpoint, Lines()
        self.rank: int | None = None  # once it has said who it is

    def send(self, message: Message) -> None:
        """A rank that does not read is dead, or will be; nothing waits for it."""
        try:
            self.socket.sendall(encode(message))
        except OSError:
            self.hang_up()  # half a message may be on its way

    def hang_up(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Keeper:
    def __init__(self, root: Path, keep_s: float = KEEP_S) -> None:
        self.root, self.keep_s = root, keep_s
        self.secret = make_directory(root)
        self._inode = root.stat().st_ino
        self.session: Session | None = None
        self.past: set[str] = set()  # names of sessions that another one followed
        self.connections: dict[socket.socket, Connection] = {}
        self.filling: Filling | None = None
        self.refused = 0  # the last serial that will not be committed: whoever asks for it later hears that too
        self.layouts: dict[str, str] = {}
        self.last_seen = time.monotonic()
        self.stopped = False
        self._wake = os.pipe()
        self.flusher = Flusher(self._flushed)
        self.shelf = Shelf(root, lambda: self.flusher.pinned)
        self.shelf.adopt()

    # What ranks say.

    def hear(self, connection: Connection, message: Message) -> None:
        kind = message["kind"]
        if connection.rank is None:
            if kind != "hello":
                raise ProtocolError(f"{kind} came before hello")
            self._hello(connection, message)
            return
        handlers = {
            "layout": self._layout,
            "begin": self._begin,
            "prepared": self._prepared,
            "failed": self._failed,
            "cancel": self._cancel,
        }
        if kind not in handlers:
            raise ProtocolError(f"{kind} is no message")
        handlers[kind](connection, message)

    def _hello(self, connection: Connection, message: Message) -> None:
        if message["version"] != VERSION or not secrets.compare_digest(str(message["secret"]), self.secret):
            raise ProtocolError("another version, or not of this run")
        told, current, everywhere = Session.of(message), self.session, int(message["everywhere"])
        if current is None or current.name != told.name:
            if told.name in self.past or (current is not None and told.incarnation < current.incarnation):
                raise ProtocolError("it is left over from a start that another one followed")
            self._start(told, everywhere)
        connection.rank = int(message["rank"])
        connection.send({"kind": "welcome", "version": VERSION, "pid": os.getpid()})

    def _start(self, session: Session, everywhere: int) -> None:
        """The trainer was started again: whoever is left of earlier starts is not listened to any more."""
        self._drop("the trainer was started again")
        for connection in self.connections.values():
            if connection.rank is not None:
                connection.hang_up()
                connection.rank = None
        if (last := self.session) is not None:
            self.past.add(last.name)
            if (last.run_id, last.nodes) != (session.run_id, session.nodes):
                self.flusher.cancel()  # of another run, or together with nodes that may not be there
        self.session, self.keep_s, self.refused = session, session.keep_s, 0
        write_keep_s(self.root, session.keep_s)
        (self.root / FINISHED).unlink(missing_ok=True)
        left_over = has_living_starts(self.root, session.name)
        self.shelf.start(session.run_id, session.arenas, everywhere, anew=left_over)

    def _layout(self, connection: Connection, message: Message) -> None:
        self.layouts = {message["layout"]: message["text"]}

    def _begin(self, connection: Connection, message: Message) -> None:
        serial = message["serial"]
        assert self.session is not None
        if self.filling is None or self.filling.serial != serial:
            self._drop("not all ranks finished it before the next one")
            if why := self._make_ready(serial, message["everywhere"]):
                self.refused = max(self.refused, serial)
                connection.send({"kind": "skipped", "serial": serial, "why": why})
                return
        assert self.filling is not None
        connection.send({"kind": "go", "serial": serial, "arena": self.filling.arena})

    def _make_ready(self, serial: int, everywhere: int) -> str:
        """Take an arena for a snapshot; why there is none, if so. All ranks hear the same, so that none waits alone."""
        assert self.session is not None
        if serial <= self.refused:
            return "another rank of this node was not ready for it"
        here = {connection.rank for connection in self.connections.values()}
        if away := sorted(set(self.session.ranks) - here):
            return f"rank {away[0]} has not found the keeper yet"
        arena = self.shelf.take(everywhere, self.session.arenas, {shard_name(rank) for rank in self.session.ranks})
        if arena is None:
            return "every arena is in use: older snapshots are still being flushed or read"
        self.filling = Filling(serial, arena, set(self.session.ranks))
        return ""

    def _prepared(self, connection: Connection, message: Message) -> None:
        filling = self.filling
        if filling is None or filling.serial != message["serial"] or filling.arena != message["arena"]:
            why = "the keeper was started again meanwhile"
            connection.send({"kind": "skipped", "serial": message["serial"], "why": why})
            return
        assert connection.rank is not None
        filling.waiting.discard(connection.rank)
        if message["writer"] is not None:
            filling.writers[connection.rank] = message["writer"]
        if message.get("manifest") is not None:
            filling.manifest, filling.layout = message["manifest"], message["layout"]
            filling.durable = message["durable"]
        if not filling.waiting:
            self.filling = None
            try:
                self._commit(filling)
            except Exception as error:  # whatever it is, the ranks must hear of it
                self._tell(
                    {"kind": "skipped", "serial": filling.serial, "why": f"it could not be committed: {error!r}"}
                )

    def _failed(self, connection: Connection, message: Message) -> None:
        if self.filling is not None and self.filling.serial == message["serial"]:
            self._drop(f"rank {connection.rank}: {message['why']}")

    def _cancel(self, connection: Connection, message: Message) -> None:
        self.flusher.cancel(message["serial"])

    def _drop(self, why: str) -> None:
        """Forget the snapshot that is being filled."""
        if self.filling is not None:
            self._tell({"kind": "skipped", "serial": self.filling.serial, "why": why})
            self.refused = max(self.refused, self.filling.serial)
            self.filling = None

    def _tell(self, message: Message) -> None:
        for connection in list(self.connections.values()):
            if connection.rank is not None:
                connection.send(message)

    # Committing and flushing.

    def _commit(self, filling: Filling) -> None:
        assert filling.manifest is not None and self.session is not None
        head = {**filling.manifest, "writers": [filling.writers[rank] for rank in sorted(filling.writers)]}
        text = json.dumps(head, separators=(",", ":"), allow_nan=False)[:-1] + "," + self.layouts[filling.layout][1:]
        name, serial = generation_name(head["step"], head["save_id"]), filling.serial
        files = {file: n for writer in filling.writers.values() for file, n in Writer(**writer).files.items()}
        self.shelf.commit(filling.arena, name, head["serial"], text.encode(), files)
        told = {"generation": name, "memory": self.shelf.nbytes, "backlog": self.flusher.backlog}
        self._tell({"kind": "committed", "serial": serial, **told})
        session = self.session
        if filling.durable and session.durable is not None:
            durable = Path(session.durable)
            task = Task(serial, name, self.root, durable, session.rate, session.nodes, check=self._check_lease)
            self.flusher.submit(task)

    def _check_lease(self) -> None:
        """Raise where another process holds the run now, by the newest start that this keeper knows of."""
        if (session := self.session) is not None and session.lease is not None:
            directory, number, claim = session.lease
            if not still_holds(FileStorage(directory), int(number), str(claim).encode()):
                raise LeaseHeldError(f"another process has taken {directory} over")

    def _flushed(self, task: Task, outcome: dict[str, Any]) -> None:
        """Called by the flusher's thread."""
        told = {"serial": task.serial, "generation": task.generation, **outcome}
        os.write(self._wake[1], json.dumps(told).encode() + b"\n")

    # The process.

    def stop(self) -> None:
        """End now, and leave everything as it is for another keeper. Any thread may call it."""
        self.stopped = True
        with suppress(OSError):  # it has ended already
            os.write(self._wake[1], b"{}\n")

    def serve(self) -> None:
        """Until the run has finished, or has not come back for `keep_s` seconds; then no memory is left."""
        with selectors.DefaultSelector() as selector, listen(self.root) as server:
            (self.root / RELEASE).write_text(str(VERSION))
            selector.register(server, selectors.EVENT_READ)
            selector.register(self._wake[0], selectors.EVENT_READ)
            while not (self.stopped or self._over()):
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is server:
                        endpoint, _ = server.accept()
                        endpoint.settimeout(1.0)  # a stopped process must not stop this one
                        self.connections[endpoint] = Connection(endpoint)
                        selector.register(endpoint, selectors.EVENT_READ)
                    elif key.fd == self._wake[0]:
                        for line in os.read(self._wake[0], 1 << 20).splitlines():
                            if message := json.loads(line):
                                self._tell(message)
                    else:
                        self._read(selector, self.connections[key.fileobj])  # type: ignore[index]
        for connection in self.connections.values():
            connection.socket.close()
        self.flusher.stop()
        for end in self._wake:
            os.close(end)
        if not self.stopped and self._is_there:
            remove(self.root)

    @property
    def _is_there(self) -> bool:
        """Whether the directory is still the one that this keeper started in."""
        try:
            return self.root.stat().st_ino == self._inode
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a look that fails says nothing of what is there
            return True

    def _over(self) -> bool:
        if not self._is_there:
            return True  # somebody deleted it: nothing of the run is left to keep
        if self.connections:
            self.last_seen = time.monotonic()
            return False
        if (self.root / FINISHED).exists() and not self.flusher.backlog:
            return True
        if time.monotonic() - self.last_seen < (self.keep_s if self.shelf.kept else min(self.keep_s, EMPTY_S)):
            return False
        if self.shelf.held or has_living_starts(self.root):  # a trainer that has not said hello yet
            self.last_seen = time.monotonic()
            return False
        return True

    def _read(self, selector: selectors.BaseSelector, connection: Connection) -> None:
        try:
            data = connection.socket.recv(1 << 20)
            if data and not is_same_user(connection.socket):
                raise ProtocolError("another user")
            for message in connection.lines.feed(data):
                self.hear(connection, message)
        except Exception as error:  # of whatever kind: it is this connection's alone
            logger.warning("a connection is closed: %r", error)
            data = b""
        if not data:
            selector.unregister(connection.socket)
            del self.connections[connection.socket]
            connection.socket.close()
            if self.filling is not None and connection.rank in self.filling.waiting:
                self._drop(f"rank {connection.rank} hung up")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m checkpointing.memory.keeper", description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="the run's directory in memory")
    parser.add_argument("--keep", type=float, default=KEEP_S, metavar="SECONDS", help="how long to wait for a trainer")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s keeper: %(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are for the trainer; this process ends when the run does
    make_directory(options.root)
    with keeper_lock(options.root) as lock:
        if lock is None:
            return 0  # another one is at work
        write_keep_s(options.root, options.keep)
        clear_forgotten(options.root.parent, options.root.name)
        Keeper(options.root, options.keep).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
