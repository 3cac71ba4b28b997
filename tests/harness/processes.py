"""Processes and what they started: found by /proc, and killed together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 300.0


def descendants(pid: int) -> list[int]:
    """Everything that a process started, directly or not, and that lives under it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = list[int](), [pid]
    while todo:
        found += (below := children.get(todo.pop(), []))
        todo += below
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants, and wait until they are gone."""
    pids = [pid, *descendants(pid)]
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    wait_for(lambda: not any(alive(each) for each in pids), 30)


def wait_for(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def leave(status: int = 0) -> NoReturn:
    """End a process of a group that has nothing more to do, without tearing the interpreter down.

    Whatever keeps a process group alive, such as FSDP2's caches, keeps gloo's threads: one that lets go of its last
    tensor in the teardown aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
