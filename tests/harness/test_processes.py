"""A process and its grandchildren are found, and gone when it is killed; others are left alone."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.harness.processes import alive, descendants, kill_tree, wait_for


@pytest.fixture
def shells() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(["sh", "-c", "sh -c 'sleep 60; :' & wait"]) for _ in range(2)]
    yield started
    for shell in started:
        kill_tree(shell.pid)
        shell.wait(30)


@pytest.mark.usefixtures("processes")
def test_a_tree_is_found_and_killed(shells: list[subprocess.Popen[bytes]]) -> None:
    doomed, other = shells
    wait_for(lambda: all(len(descendants(shell.pid)) == 2 for shell in shells), 30)
    below, others = descendants(doomed.pid), descendants(other.pid)
    assert all(map(alive, [doomed.pid, *below]))
    kill_tree(doomed.pid)
    assert not any(map(alive, [doomed.pid, *below])) and all(map(alive, [other.pid, *others]))


def test_waiting_in_vain_ends() -> None:
    with pytest.raises(AssertionError, match="waited in vain"):
        wait_for(lambda: False, 0.05)
