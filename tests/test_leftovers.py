"""Runs after all other tests: nothing of them may be left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.processes import alive, descendants, wait_for
from tests.worlds import WORLD


def test_no_process_is_left() -> None:
    WORLD.stop()

    def left() -> list[str]:
        found = [pid for pid in descendants(os.getpid()) if alive(pid)]
        names = {
            pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in found if alive(pid)
        }
        # multiprocessing's own resource tracker lives as long as this process does.
        return [name for name in names.values() if "resource_tracker" not in name]

    try:
        wait_for(lambda: not left(), 20)
    except AssertionError:
        pytest.fail(f"left behind: {left()}")


def test_no_shared_memory_is_left(request: pytest.FixtureRequest) -> None:
    before = request.config.shared_memory_before  # type: ignore[attr-defined]
    now = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    # Locks of multiprocessing in this very process, such as tqdm's, go when it does; .ci/run looks once more then.
    assert {name for name in now - before if not name.startswith("sem.mp-")} == set()
