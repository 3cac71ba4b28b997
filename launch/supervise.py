"""Waiting for trainers that another program starts: signals reach them, they get their time, and their status is told.

torchrun and DeepSpeed's launcher end the trainers on a signal and exit with a status of their own. Here every signal
goes to the trainers alone; what starts them sees them end, and what they left says how.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.command import TRAINER
from trainer.elastic.launcher import LAUNCHER, this_launcher
from trainer.elastic.preemption import AGAIN, not_ignored, take_early, warnings_of
from trainer.outcome import DIRECTORY, Outcome, read

MORE_S = 15.0  # beyond the grace, for what closes after a run: then SIGKILL
POLL_S = 0.1


def supervise(start: Callable[[], int], *, warning: str, grace_s: float) -> int:
    """Call `start`, which runs trainers and returns a status, in a thread; the status of the run."""
    with _outcomes() as directory, _Forward(warning) as forward:
        found: list[int] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                found.append(start())
            except BaseException as error:
                failed.append(error)

        # In the main thread torchrun would take the signals for itself.
        thread = threading.Thread(target=work, name="start", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if forward.since is None:
                continue
            forward.to_new_ones()
            if not trainers() and (outcome := read(directory)) is not None and outcome.status in (AGAIN, 130):
                break  # rather than start them again
            if time.monotonic() - forward.since > grace_s + MORE_S:
                for pid in trainers():
                    _send(pid, signal.SIGKILL)
                thread.join(MORE_S)
                break
        for pid in trainers():
            _send(pid, signal.SIGKILL)
        if failed and forward.since is None:
            raise failed[0]
        return _status(read(directory), found[0] if found else None, forward.first)


def _status(outcome: Outcome | None, status: int | None, signum: int) -> int:
    """The exit status by what trainers say, how the launcher ended, and which signal came. Its 1 says nothing."""
    if status is not None and status != 1 and not signum:
        return status
    if outcome is not None:
        return outcome.status or status or 0
    return 128 + signum if signum else status if status is not None else 1


@contextlib.contextmanager
def _outcomes() -> Iterator[Path]:
    """Where trainers say how they ended: where a job asks for it, or here. They are told who starts them, too."""
    given = os.environ.get(DIRECTORY)
    with tempfile.TemporaryDirectory() as own:
        before = {key: os.environ.get(key) for key in (DIRECTORY, LAUNCHER)}
        os.environ |= {DIRECTORY: given or own, LAUNCHER: this_launcher()}
        try:
            yield Path(given or own)
        finally:
            for key, value in before.items():
                os.environ.pop(key)
                if value is not None:
                    os.environ[key] = value


class _Forward:
    """While it is entered, signals go to the trainers that this process has started."""

    def __init__(self, warning: str) -> None:
        self.first, self.since = 0, None
        self._told: set[int] = set()
        self._signals = not_ignored([*warnings_of(warning), signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])

    first: int  # the first that came
    since: float | None  # when

    def __enter__(self) -> _Forward:
        self._before = {number: signal.signal(number, self._hand_on) for number in self._signals}
        for number in take_early():  # while this command was read and checked
            if number in self._signals:
                self._hand_on(number, None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, _: object) -> None:
        if self.since is None:
            self.first, self.since = number, time.monotonic()
        self._send(number, trainers())

    def to_new_ones(self) -> None:
        """Signal the trainers that were started since, by a launcher that was about to, or that starts them again."""
        self._send(self.first, [pid for pid in trainers() if pid not in self._told])

    def _send(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            self._told.add(pid)
            _send(pid, signal.SIGTERM if number in (signal.SIGHUP, signal.SIGQUIT) else number)


def trainers(pid: int | None = None) -> list[int]:
    """The processes of the trainer below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = list[int](), [pid or os.getpid()]
    while todo:
        for child in children.get(todo.pop(), []):
            (found if _is_trainer(child) else todo).append(child)  # what a trainer starts is its own affair
    return found


def _is_trainer(pid: int) -> bool:
    """Whether a process is a trainer: its script is among the first words. Launchers have it among the last."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:4]
    except OSError:
        return False
    return str(TRAINER).encode() in words and b"-m" not in words


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def say_how(status: int, cause: str = "") -> None:
    """Say what a status means, where the trainer has not explained itself."""
    if status in (0, 2, AGAIN, 130) or not cause:  # a refusal has explained itself
        return
    if status > 128:
        print(
            f"launch: {cause} was ended by signal {status - 128}; "
            "with resume=auto, the default, the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
    else:
        print(f"launch: {cause} failed with status {status}; its message is above", file=sys.stderr)
