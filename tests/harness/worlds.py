"""A world of processes that many calls share: importing torch in every process is what costs, so it is done once.

`world.run(function, size, *arguments)` calls a module-level function on the first `size` processes, inside a fresh
gloo process group, and returns what each returned. Tests ask for the fixture `world`, whose processes are forks;
`with fresh_world() as world:` starts processes of their own, for benchmarks.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tests.harness.forks import Fork
from tests.harness.ports import free_port
from tests.harness.processes import ROOT

WAIT_S = 180
LEAVE_S = 20
# Threads of process groups that a process may have left: they wake up a hundred times a second. torch and DeepSpeed
# keep some groups alive, and processes with too many are replaced.
MOST_LEFT = 40


class Process:
    """One rank: a process that is told what to call."""

    def __init__(self, rank: int, forked: bool) -> None:
        here, there = multiprocessing.connection.Pipe()
        main = getattr(sys.modules["__main__"], "__spec__", None)
        words = [sys.executable, "-m", "tests.harness.rank", str(rank), str(there.fileno())]
        words += [main.name] if main is not None and main.name.partition(".")[0] != "pytest" else []
        # What a rank prints is no part of a benchmark's report.
        options = {"cwd": ROOT, "pass_fds": [there.fileno()], "stdout": 2}
        self.process = (Fork if forked else subprocess.Popen)(words, **options)  # type: ignore[call-overload]
        there.close()
        self.pipe = here


class SharedWorld:
    """The processes, started at the first use."""

    def __init__(self, *, forked: bool, wait_s: float = WAIT_S) -> None:
        self._forked, self._wait_s = forked, wait_s
        self._ranks: list[Process] = []

    def run(self, function: Callable[..., Any], size: int, *arguments: Any, environment: bool = False) -> list[Any]:
        """Every rank's result. An exception on any rank fails the call, with that rank's trace.

        `environment=True` only sets what torchrun would set, and joins no process group.
        """
        while len(self._ranks) < size:
            self._ranks.append(Process(len(self._ranks), self._forked))
        port = free_port()
        # By value: multiprocessing's own pickling would lend the tensors' memory instead.
        call = pickle.dumps((function, size, port, arguments, environment, self._wait_s))
        try:
            for rank in self._ranks[:size]:
                rank.pipe.send_bytes(call)
        except OSError as error:  # one that has ended since its last call
            statuses = [rank.process.poll() for rank in self._ranks]
            self.stop(kill=True)
            raise AssertionError(f"a rank ended between two calls; statuses {statuses}") from error
        replies: list[tuple[str, Any, int]] = []
        for number, rank in enumerate(self._ranks[:size]):
            if not rank.pipe.poll(self._wait_s):
                self.stop(kill=True)
                raise AssertionError(f"rank {number} did not answer within {self._wait_s} s; the others said {replies}")
            try:
                replies.append(pickle.loads(rank.pipe.recv_bytes()))  # noqa: S301  # from our own rank
            except EOFError:
                status = rank.process.wait(LEAVE_S)
                self.stop(kill=True)
                raise AssertionError(f"rank {number} ended with status {status}; the others said {replies}") from None
        if max(left for _, _, left in replies) > MOST_LEFT:
            self.stop()
        failures = [f"rank {rank}:\n{text}" for rank, (kind, text, _) in enumerate(replies) if kind == "error"]
        assert not failures, "\n".join(failures)
        return [value for _, value, _ in replies]

    def stop(self, *, kill: bool = False) -> None:
        """They leave by themselves, so that what they registered goes with them; who does not is killed."""
        for rank in self._ranks:
            rank.pipe.close()
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(0 if kill else LEAVE_S)
            rank.process.kill()
            rank.process.wait(LEAVE_S)
        self._ranks = []


def on_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, wait_s: float = WAIT_S, environment: bool = False
) -> list[Any]:
    """Call a module-level function on every rank of a group of processes that are started for it; each one's result."""
    with fresh_world(wait_s) as world:
        return world.run(function, size, *arguments, environment=environment)


@contextlib.contextmanager
def fresh_world(wait_s: float = WAIT_S) -> Iterator[SharedWorld]:
    """Processes that are started, and end with the context."""
    world = SharedWorld(forked=False, wait_s=wait_s)
    try:
        yield world
    finally:
        world.stop()
