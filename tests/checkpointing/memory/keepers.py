"""A keeper in a thread of the test, on any directory: what it does does not depend on where that lies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpointing.memory.keeper import Keeper
from checkpointing.memory.messages import connect
from tests.harness.processes import wait_for

WAIT_S = 30.0


@contextmanager
def keeping(root: Path, keep_s: float = 3600) -> Iterator[Keeper]:
    """It goes on until the run has finished, or the test ends."""
    keeper = Keeper(root, keep_s)
    thread = threading.Thread(target=keeper.serve, name=f"keeper of {root}", daemon=True)
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
