"""A rank's side of the keeper: starting it, talking to it, and going on without it while it is away."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from checkpointing.errors import CheckpointError
from checkpointing.memory.directory import LOG, RELEASE, make_directory, read_secret
from checkpointing.memory.messages import VERSION, Lines, Message, connect, encode, peer_pid

logger = logging.getLogger("checkpointing")

RESTART_S = 20.0  # a keeper imports torch before it listens
SEND_S = 5  # one that does not read for so long hangs


def start_keeper(root: Path, keep_s: float) -> None:
    """Start this node's keeper, which is nobody's child: a shell starts it and ends. A second one ends at once."""
    make_directory(root)
    keeper = [sys.executable, "-m", "checkpointing.memory.keeper", str(root), "--keep", str(keep_s)]
    with open(root / LOG, "ab") as log:
        os.utime(log.fileno())
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *keeper],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )


def ensure_keeper(root: Path, keep_s: float) -> None:
    """Start one unless one listens. It is some seconds until it does."""
    make_directory(root)
    try:
        connect(root).close()
    except OSError:
        start_keeper(root, keep_s)


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
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._work, name="keeper-client", daemon=True)

    def start(self) -> None:
        """Once all that `heard` and `lost` touch is there: a keeper may hang up at once."""
        self._thread.start()

    def send(self, *messages: Message) -> bool:
        """Whether they are on their way. False while no keeper listens, or none that has said welcome."""
        endpoint = self._socket
        if endpoint is None or not self.connected.is_set():
            return False
        try:
            with self._sending:
                endpoint.sendall(b"".join(map(encode, messages)))
        except OSError:
            self.hang_up()  # half a message may be on its way: nothing can follow it
            return False
        return True

    def hang_up(self) -> None:
        """Close the connection to a keeper that does not answer. The welcome of the next one shows whether it lives."""
        self.connected.clear()
        if (endpoint := self._socket) is not None:
            with contextlib.suppress(OSError):
                endpoint.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self.hang_up()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        started = time.monotonic() - _log_age(self._root)
        while not self._closed.is_set():
            try:
                endpoint = connect(self._root)
            except OSError:
                if self._starts and time.monotonic() - started > RESTART_S:
                    started = time.monotonic()
                    with contextlib.suppress(OSError, CheckpointError, subprocess.SubprocessError):
                        start_keeper(self._root, self._keep_s)
                self._closed.wait(0.02)
                continue
            welcome = False
            with endpoint:
                try:
                    welcome = self._converse(endpoint)
                    started = -1e9
                except (OSError, CheckpointError) as error:
                    logger.warning("the keeper of %s: %s", self._root, error)
                finally:
                    self._socket = None
                    self.connected.clear()
                    if not self._closed.is_set():
                        self._lost()
                if not welcome and self._starts and not self._closed.is_set():
                    with contextlib.suppress(OSError, CheckpointError, subprocess.SubprocessError):
                        self._replace_another_release(endpoint)
            self._closed.wait(0.1)  # one that hangs up at once is not asked without end

    def _replace_another_release(self, endpoint: socket.socket) -> None:
        """A keeper that waits for its run may be older than this release: it hangs up, and would for an hour.

        One may be ended at any time; what it held is in its directory, where the next one finds it.
        """
        try:
            spoken = (self._root / RELEASE).read_text()
        except FileNotFoundError:
            spoken = "1"  # which did not say
        pid = peer_pid(endpoint)
        if spoken != str(VERSION) and pid not in (0, os.getpid()):
            logger.warning("the keeper %d of %s is of another release, and is replaced", pid, self._root)
            os.kill(pid, signal.SIGKILL)
            start_keeper(self._root, self._keep_s)

    def _converse(self, endpoint: socket.socket) -> bool:
        """Until the keeper, or this rank, hangs up; whether the keeper said welcome."""
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_S, 0))
        endpoint.sendall(encode({**self._greeting, "secret": read_secret(self._root)}))
        lines = Lines()
        self._socket = endpoint
        while not self._closed.is_set() and (data := endpoint.recv(1 << 20)):
            for message in lines.feed(data):
                if message["kind"] == "welcome":
                    if message["version"] != VERSION:
                        raise CheckpointError("a keeper of another release is at work")
                    self.connected.set()
                self._heard(message)
        return self.connected.is_set()


def _log_age(root: Path) -> float:
    """Seconds since a keeper was last heard of: one that was started just now does not listen yet."""
    try:
        return time.time() - (root / LOG).stat().st_mtime
    except OSError:
        return 1e9
