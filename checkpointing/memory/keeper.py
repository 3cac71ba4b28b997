"""The keeper: one process per node that outlives the trainer. It commits, keeps and flushes what ranks copy to memory.

`protocol.py` decides what a message leads to; this is the process around it. Nothing that matters is in this process
alone: started again, it finds everything on the tmpfs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpointing.errors import LeaseHeldError
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
from checkpointing.memory.flush_queue import FlushQueue, Task
from checkpointing.memory.messages import VERSION, Lines, Message, ProtocolError, encode, is_same_user, listen
from checkpointing.memory.node_memory import NodeMemory
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
from checkpointing.stores import open_storage

logger = logging.getLogger("keeper")

EMPTY_S = 120.0  # how long it waits for a trainer where there is nothing to keep


class Connection:
    def __init__(self, endpoint: socket.socket, number: int) -> None:
        self.socket, self.number, self.lines = endpoint, number, Lines()

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
    """The process: sockets, memory and the thread that flushes, as the protocol asks for them."""

    def __init__(self, root: Path, keep_s: float = KEEP_S) -> None:
        self.root, self.keep_s = root, keep_s
        self.protocol = KeeperProtocol(make_directory(root), os.getpid())
        self._inode = root.stat().st_ino
        self._connections: dict[int, Connection] = {}
        self._numbers = itertools.count()
        self._last_seen = time.monotonic()
        self._stopped = False
        self._wake = os.pipe()
        self.flush_queue = FlushQueue(self._flushed)
        self.node_memory = NodeMemory(root, lambda: self.flush_queue.pinned)
        self.node_memory.adopt()

    # Effects of the protocol.

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply(to, message):
                    if (connection := self._connections.get(to)) is not None:
                        connection.send(message)
                case HangUp(to):
                    if (connection := self._connections.get(to)) is not None:
                        connection.hang_up()
                case StartAnew(session, everywhere):
                    self._start(session, everywhere)
                case TakeArena(_, _, everywhere, arenas, files):
                    self._carry_out(self.protocol.taken(effect, self.node_memory.take(everywhere, arenas, files)))
                case CommitArena():
                    self._carry_out(self._commit(effect))
                case Flush(serial, generation, session):
                    assert session.durable is not None
                    self.flush_queue.submit(
                        Task(
                            serial,
                            generation,
                            self.root,
                            session.durable,
                            session.store,
                            session.rate,
                            session.nodes,
                            check=self._check_lease,
                        )
                    )
                case CancelFlush(serial):
                    self.flush_queue.cancel(serial)

    def _start(self, session: Session, everywhere: int) -> None:
        self.keep_s = session.keep_s
        write_keep_s(self.root, session.keep_s)
        (self.root / FINISHED).unlink(missing_ok=True)
        left_over = has_living_starts(self.root, session.name)
        self.node_memory.start(session.run_id, session.arenas, everywhere, anew=left_over)

    def _commit(self, commit: CommitArena) -> list[Effect]:
        try:
            self.node_memory.commit(commit.arena, commit.generation, commit.serial, commit.manifest, commit.files)
            return self.protocol.committed(commit, self.node_memory.nbytes, self.flush_queue.backlog)
        except Exception as error:  # whatever it is, the ranks must hear of it
            return self.protocol.not_committed(commit.serial, error)

    def _check_lease(self) -> None:
        """Raise where another process holds the run now, by the newest start that this keeper knows of."""
        if (session := self.protocol.session) is not None and session.lease is not None:
            directory, number, claim = session.lease
            if not still_holds(open_storage(str(directory)), int(number), str(claim).encode()):
                raise LeaseHeldError(f"another process has taken {directory} over")

    def _flushed(self, task: Task, outcome: dict[str, Any]) -> None:
        """Called by the flusher's thread."""
        told = {"serial": task.serial, "generation": task.generation, **outcome}
        os.write(self._wake[1], json.dumps(told).encode() + b"\n")

    # The process's life.

    def stop(self) -> None:
        """End now, and leave everything as it is for another keeper. Any thread may call it."""
        self._stopped = True
        with suppress(OSError):  # it has ended already
            os.write(self._wake[1], b"{}\n")

    def serve(self) -> None:
        """Until the run has finished, or has not come back for `keep_s` seconds; then no memory is left."""
        with selectors.DefaultSelector() as selector, listen(self.root) as server:
            (self.root / RELEASE).write_text(str(VERSION))
            selector.register(server, selectors.EVENT_READ)
            selector.register(self._wake[0], selectors.EVENT_READ)
            while not (self._stopped or self._over()):
                for key, _ in selector.select(timeout=1.0):
                    if key.fileobj is server:
                        self._accept(selector, server)
                    elif key.fd == self._wake[0]:
                        for line in os.read(self._wake[0], 1 << 20).splitlines():
                            if message := json.loads(line):
                                self._carry_out(self.protocol.flushed(message))
                    else:
                        self._read(selector, key.data)
        for connection in self._connections.values():
            connection.socket.close()
        self.flush_queue.stop()
        for end in self._wake:
            os.close(end)
        if not self._stopped and self._is_there:
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

    @property
    def _has_finished(self) -> bool:
        """Whether the run has said that it needs no memory any more; a look that fails says nothing."""
        try:
            return (self.root / FINISHED).exists()
        except OSError:
            return False

    def _over(self) -> bool:
        if not self._is_there:
            return True  # somebody deleted it: nothing of the run is left to keep
        if self._connections:
            self._last_seen = time.monotonic()
            return False
        if self._has_finished and not self.flush_queue.backlog:
            return True
        if time.monotonic() - self._last_seen < (self.keep_s if self.node_memory.kept else min(self.keep_s, EMPTY_S)):
            return False
        if self.node_memory.held or has_living_starts(self.root):  # a trainer that has not said hello yet
            self._last_seen = time.monotonic()
            return False
        return True

    def _accept(self, selector: selectors.BaseSelector, server: socket.socket) -> None:
        endpoint, _ = server.accept()
        endpoint.settimeout(1.0)  # a stopped process must not stop this one
        connection = Connection(endpoint, next(self._numbers))
        self._connections[connection.number] = connection
        self.protocol.opened(connection.number)
        selector.register(endpoint, selectors.EVENT_READ, connection)

    def _read(self, selector: selectors.BaseSelector, connection: Connection) -> None:
        try:
            data = connection.socket.recv(1 << 20)
            if data and not is_same_user(connection.socket):
                raise ProtocolError("another user")
            for message in connection.lines.feed(data):
                self._carry_out(self.protocol.heard(connection.number, message))
        except Exception as error:  # of whatever kind: it is this connection's alone
            logger.warning("a connection is closed: %r", error)
            data = b""
        if not data:
            selector.unregister(connection.socket)
            del self._connections[connection.number]
            connection.socket.close()
            self._carry_out(self.protocol.closed(connection.number))


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
