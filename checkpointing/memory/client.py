"""A rank's side of the keeper: starting it, talking to it, and going on without it while it is away."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from checkpointing.errors import CheckpointError
from checkpointing.memory.messages import VERSION, Lines, Message, connect, encode

logger = logging.getLogger("checkpointing")

LOG = "keeper.log"


def start_keeper(root: Path, keep_s: float) -> None:
    """Start this node's keeper, which is nobody's child: a shell starts it and ends. A second one ends at once."""
    keeper = [sys.executable, "-m", "checkpointing.memory.keeper", str(root), "--keep", str(keep_s)]
    with open(root / LOG, "ab") as log:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *keeper],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )


class Client:
    """One connection after the other. `heard` is called with every message, in this object's thread.

    `greeting` is sent first on each. The rank that starts keepers (`starts`) starts another one when it is away.
    """

    def __init__(
        self,
        root: Path,
        greeting: Message,
        heard: Callable[[Message], None],
        *,
        starts: bool,
        keep_s: float,
        lost: Callable[[], None],
    ) -> None:
        self._root, self._greeting, self._heard, self._lost = root, greeting, heard, lost
        self._starts, self._keep_s = starts, keep_s
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._work, name="keeper-client", daemon=True)
        self._thread.start()

    def send(self, *messages: Message) -> bool:
        """Whether they are on their way. False while no keeper listens, or none that has said welcome."""
        with self._lock:
            if self._socket is None or not self.connected.is_set():
                return False
            try:
                self._socket.sendall(b"".join(map(encode, messages)))
            except OSError:
                return False
            return True

    def hang_up(self) -> None:
        """On a keeper that does not answer; whether another connection fares better shows by its welcome."""
        with self._lock:
            self.connected.clear()
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self.hang_up()
        self._thread.join()

    def _work(self) -> None:
        started = -1e9
        while not self._closed:
            try:
                endpoint = connect(self._root)
            except OSError:
                if self._starts and time.monotonic() - started > 20:  # it imports torch before it listens
                    started = time.monotonic()
                    with contextlib.suppress(OSError, subprocess.SubprocessError):
                        start_keeper(self._root, self._keep_s)
                time.sleep(0.02)
                continue
            started = -1e9
            with endpoint:
                try:
                    endpoint.sendall(encode(self._greeting))
                    lines = Lines()
                    with self._lock:
                        self._socket = endpoint
                    while data := endpoint.recv(1 << 20):
                        for message in lines.feed(data):
                            if message["kind"] == "welcome":
                                if message["version"] != VERSION:
                                    raise CheckpointError("a keeper of another release is at work")
                                self.connected.set()
                            self._heard(message)
                except (OSError, CheckpointError) as error:
                    logger.warning("the keeper of %s: %s", self._root, error)
                finally:
                    with self._lock:
                        self._socket = None
                    self.connected.clear()
                    if not self._closed:
                        self._lost()
