"""The keeper: one process per node that outlives the trainer. It commits, keeps and flushes what ranks copy to memory.

It is the only one that renames and deletes arenas. Ranks fill the arena they are given, each its own file, and say
when they are done. Nothing that matters is in this process alone: started again, it finds everything on the tmpfs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import secrets
import selectors
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpointing.errors import DamagedError
from checkpointing.format import COMMIT, MANIFEST, Writer, digest, generation_name, shard_name
from checkpointing.generations import scan
from checkpointing.lease import held_generations
from checkpointing.memory.arena import ARENA, arena_name
from checkpointing.memory.flush import DirectStorage, Nodes
from checkpointing.memory.flushing import Flusher
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import (
    VERSION,
    Lines,
    Message,
    ProtocolError,
    encode,
    is_same_user,
    listen,
    make_directory,
)
from checkpointing.storage import FileStorage

logger = logging.getLogger("keeper")

LOCK = "keeper.lock"
KEEP_S = 3600.0  # how long the memory stays when the run does not come back


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
    last: bool = False  # must become durable, however busy the disk is


@dataclass(frozen=True, slots=True)
class Kept:
    """A committed generation."""

    name: str
    serial: int


@dataclass
class Session:
    """One start of the trainer, as its ranks tell it."""

    name: str
    run_id: str
    ranks: list[int]
    nodes: Nodes
    arenas: int
    keep_s: float
    durable: str | None
    rate: float


class Connection:
    def __init__(self, endpoint: socket.socket) -> None:
        self.socket, self.lines = endpoint, Lines()
        self.rank: int | None = None  # once it has said who it is

    def send(self, message: Message) -> None:
        """A rank that does not read is dead, or will be; nothing waits for it."""
        with suppress(OSError):
            self.socket.sendall(encode(message))


class Keeper:
    def __init__(self, root: Path, keep_s: float = KEEP_S) -> None:
        self.root, self.keep_s = root, keep_s
        self.secret = make_directory(root)
        self.storage = FileStorage(root)
        self.session: Session | None = None
        self.connections: dict[socket.socket, Connection] = {}
        self.filling: Filling | None = None
        self.layouts: dict[str, str] = {}
        self.kept: list[Kept] = []  # newest first
        self.last_seen = time.monotonic()
        self.finished = self.stopped = False
        self._wake = os.pipe()
        self.flusher = Flusher(self._flushed)
        self.adopt()

    # What lies on the tmpfs.

    def adopt(self) -> None:
        """Take over what is there: committed generations stay, everything else is room."""
        busy, self.kept = self._busy(), []
        for generation in scan(self.storage):
            manifest = generation.manifest
            stranger = self.session is not None and manifest is not None and manifest.run_id != self.session.run_id
            if manifest is not None and generation.sound and not generation.abandoned and not stranger:
                self.kept.append(Kept(generation.name, manifest.serial))
            elif generation.name not in busy:
                self._release(generation.name)

    @property
    def free(self) -> list[int]:
        """Numbers of the arenas that nobody fills."""
        filling = self.filling.arena if self.filling is not None else ""
        matches = (ARENA.fullmatch(path.name) for path in self.root.iterdir() if path.name != filling)
        return sorted(int(match[1]) for match in matches if match)

    def _busy(self) -> set[str]:
        """Generations that are being read or flushed."""
        return held_generations(self.storage) | self.flusher.pinned

    def _release(self, name: str) -> None:
        """Make a generation an arena again: COMMIT goes first, so that it never names what is written over."""
        directory = self.root / name
        (directory / COMMIT).unlink(missing_ok=True)
        for path in directory.iterdir():
            if not path.name.startswith("shard-"):
                path.unlink()
        directory.rename(self.root / self._unused())

    def _take(self, everywhere: int) -> str | None:
        """An arena to fill; None where none is free."""
        assert self.session is not None
        if not self.free and len(self.kept) >= self.session.arenas:
            busy = self._busy()
            usable = [kept for kept in self.kept[1:] if kept.serial < everywhere and kept.name not in busy]
            if not usable:
                return None
            self.kept.remove(usable[-1])
            self._release(usable[-1].name)
        path = self.root / (arena_name(self.free[0]) if self.free else self._unused())
        path.mkdir(mode=0o700, exist_ok=True)
        own = {shard_name(rank) for rank in self.session.ranks}
        for file in path.iterdir():
            if file.name not in own:  # of another layout
                file.unlink()
        return path.name

    def _unused(self) -> str:
        return next(name for n in range(10_000) if not (self.root / (name := arena_name(n))).exists())

    @property
    def nbytes(self) -> int:
        """Memory that this run takes on this node."""
        return sum(file.stat().st_blocks * 512 for file in self.root.rglob("shard-*"))

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
            "finish": self._finish,
        }
        if kind not in handlers:
            raise ProtocolError(f"{kind} is no message")
        handlers[kind](connection, message)

    def _hello(self, connection: Connection, message: Message) -> None:
        if message["version"] != VERSION or not secrets.compare_digest(str(message["secret"]), self.secret):
            raise ProtocolError("another version, or not of this run")
        told = Session(
            str(message["session"]),
            str(message["run_id"]),
            [int(rank) for rank in message["ranks"]],
            Nodes(*message["nodes"]),
            int(message["arenas"]),
            float(message["keep_s"]),
            message["durable"],
            float(message["rate"]),
        )
        if self.session is None or self.session.name != told.name:
            self._drop("the trainer was started again")
            self.session, self.keep_s = told, told.keep_s
            self.adopt()
            self._shrink()
        connection.rank = int(message["rank"])
        connection.send({"kind": "welcome", "version": VERSION, "pid": os.getpid()})

    def _shrink(self) -> None:
        """Give back arenas that this session does not use."""
        assert self.session is not None
        busy = self._busy()
        for kept in [kept for kept in self.kept[1:] if kept.name not in busy]:
            self._release(kept.name)
            self.kept.remove(kept)
        while (free := self.free) and len(free) + len(self.kept) > self.session.arenas:
            shutil.rmtree(self.root / arena_name(free[-1]))

    def _layout(self, connection: Connection, message: Message) -> None:
        self.layouts = {message["layout"]: message["text"]}

    def _begin(self, connection: Connection, message: Message) -> None:
        serial = message["serial"]
        assert self.session is not None
        if self.filling is None or self.filling.serial != serial:
            self._drop("not all ranks finished it before the next one")
            arena = self._take(message["everywhere"])
            if arena is None:
                why = "every arena is in use: older snapshots are still being flushed or read"
                connection.send({"kind": "skipped", "serial": serial, "why": why})
                return
            self.filling = Filling(serial, arena, set(self.session.ranks))
        connection.send({"kind": "go", "serial": serial, "arena": self.filling.arena})

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
            filling.durable, filling.last = message["durable"], message["last"]
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

    def _finish(self, connection: Connection, message: Message) -> None:
        self.finished = True

    def _drop(self, why: str) -> None:
        """Forget the snapshot that is being filled."""
        if self.filling is not None:
            self._tell({"kind": "skipped", "serial": self.filling.serial, "why": why})
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
        data = text.encode()
        name = generation_name(head["step"], head["save_id"])
        arena = self.root / filling.arena
        for writer in filling.writers.values():
            for file, nbytes in Writer(**writer).files.items():
                if (size := (arena / file).stat().st_size) != nbytes:
                    raise DamagedError(f"{file} has {size} bytes, and {nbytes} were written")
        (arena / MANIFEST).write_bytes(data)
        directory = arena.rename(self.root / name)
        try:
            (directory / ".commit").write_text(digest(data))
            (directory / ".commit").rename(directory / COMMIT)
        except OSError:
            directory.rename(arena)
            raise
        self.kept.insert(0, Kept(name, head["serial"]))
        told = {"generation": name, "memory": self.nbytes, "backlog": self.flusher.backlog}
        self._tell({"kind": "committed", "serial": filling.serial, **told})
        if filling.durable and self.session.durable is not None:
            durable = DirectStorage(self.session.durable, self.session.rate, self.flusher.check)
            memory = MappedStorage(self.root)  # one of its own: its mappings go with the flush
            if not self.flusher.submit(filling.serial, name, memory, durable, self.session.nodes, filling.last):
                why = "the one before it is still being written: the disk is slower than checkpoint.every asks for"
                self._tell({"kind": "undurable", "serial": filling.serial, "generation": name, "why": why})

    def _flushed(self, serial: int, name: str, outcome: dict[str, Any]) -> None:
        """Called by the flusher's thread."""
        os.write(self._wake[1], json.dumps({"serial": serial, "generation": name, **outcome}).encode() + b"\n")

    # The process.

    def stop(self) -> None:
        """From any thread: end now, and leave everything as it is for another keeper."""
        self.stopped = True
        with suppress(OSError):  # it has ended already
            os.write(self._wake[1], b"{}\n")

    def serve(self) -> None:
        """Until the run has finished, or has not come back for `keep_s` seconds; then no memory is left."""
        with selectors.DefaultSelector() as selector, listen(self.root) as server:
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
        if self.stopped:
            return
        shutil.rmtree(self.root, ignore_errors=True)
        with suppress(OSError):  # other runs of this user are there
            self.root.parent.rmdir()

    def _over(self) -> bool:
        if self.connections:
            self.last_seen = time.monotonic()
            return False
        if self.finished and not self.flusher.backlog:
            return True
        return time.monotonic() - self.last_seen > self.keep_s

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


def clear_forgotten(root: Path, keep_s: float) -> list[str]:
    """Delete what other runs of this user left beside this one's directory, long ago and without a keeper.

    As where the keeper was killed with everything else, and the run never came back. Returns the names.
    """
    gone = []
    for path in root.parent.iterdir():
        lock = path / LOCK
        if path == root or not lock.exists() or path.stat().st_uid != os.getuid():
            continue
        last = max((file.stat().st_mtime for file in path.rglob("*")), default=0.0)
        with suppress(OSError), open(lock, "r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - last > keep_s:
                shutil.rmtree(path)
                gone.append(path.name)
    return gone


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m checkpointing.memory.keeper", description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="the run's directory in memory")
    parser.add_argument("--keep", type=float, default=KEEP_S, metavar="SECONDS", help="how long to wait for a trainer")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s keeper: %(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are for the trainer; this process ends when the run does
    make_directory(options.root)
    with open(options.root / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0  # another one is at work
        clear_forgotten(options.root, options.keep)
        Keeper(options.root, options.keep).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
