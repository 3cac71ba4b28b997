"""How ranks and their node's keeper talk: one JSON object a line over a local socket, listed in `docs/keeper.md`."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing.errors import CheckpointError

VERSION = 3
SOCKET = "keeper.sock"
MOST_BYTES = 256 * 1024 * 1024  # of one message: a manifest may be large

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Nodes:
    """Which of how many nodes this is: each flushes what its ranks wrote, and the first one commits."""

    number: int = 0
    count: int = 1


ALONE = Nodes()


class ProtocolError(CheckpointError):
    """A message over the socket is none of ours, or of another version."""


def listen(root: Path) -> socket.socket:
    """The keeper's socket. Whatever a dead keeper left under its name goes."""
    (root / SOCKET).unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(root) as short:
        server.bind(short)
    os.chmod(root / SOCKET, 0o600)
    server.listen(64)
    return server


def connect(root: Path) -> socket.socket:
    """A connection to the keeper; `OSError` where none listens."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(root) as short:
            client.settimeout(5.0)  # many may wait for one that hangs
            client.connect(short)
            client.settimeout(None)
    except OSError:
        client.close()
        raise
    return client


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user, by the kernel's word."""
    return _peer(connection)[1] == os.getuid()


def peer_pid(connection: socket.socket) -> int:
    """The process that listened, or connected, at the other end."""
    return _peer(connection)[0]


def _peer(connection: socket.socket) -> tuple[int, int]:
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


class _short:
    """A path of the socket that fits the 108 bytes of an address, however long the directory's is."""

    def __init__(self, root: Path) -> None:
        self._descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> str:
        return f"/proc/self/fd/{self._descriptor}/{SOCKET}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def encode(message: Message) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Messages out of bytes as they come."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        self._rest += data
        if len(self._rest) > MOST_BYTES:
            raise ProtocolError(f"a message has over {MOST_BYTES:,} bytes")
        *lines, rest = bytes(self._rest).split(b"\n") if b"\n" in data else [bytes(self._rest)]
        self._rest = bytearray(rest)
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise ProtocolError("a line is not JSON") from None
            if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
                raise ProtocolError("a line is no message")
            yield message
