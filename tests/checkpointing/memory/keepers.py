"""A keeper in a thread of the test, on any directory: what it does does not depend on where that lies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpointing.memory.keeper import Keeper
from checkpointing.memory.messages import connect

WAIT_S = 30.0


@contextmanager
def keeping(root: Path, keep_s: float = 3600) -> Iterator[Keeper]:
    """It goes on until the run has finished, or the test ends."""
    keeper = Keeper(root, keep_s)
    thread = threading.Thread(target=keeper.serve, daemon=True)
    thread.start()
    wait_for(lambda: answers(root))
    try:
        yield keeper
    finally:
        keeper.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the keeper does not end"


def answers(root: Path) -> bool:
    """Whether a keeper listens; its socket is there a moment before it does."""
    try:
        connect(root).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
