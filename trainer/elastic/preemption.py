"""Warnings that this process will be ended soon: seen at once, acted on by all ranks together after a step.

A handler only notes the signal. The step boundary that follows saves and leaves; where that does not happen in time, or
the signal comes again, the process leaves as it is, and what was committed before is what the run goes on from.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

AGAIN = 75  # the exit status of a run that was preempted: EX_TEMPFAIL, start me again
ECHO_S = 1.0  # launchers hand a signal on that the scheduler sends to every process as well: that is one warning


class Preemption:
    """The warnings of one run. `give_up(why)` is called in another thread when there is no more time, and must exit."""

    def __init__(self, grace_s: float, give_up: Callable[[str], None]) -> None:
        self.signum = 0  # the first that came, here or on another rank
        self.give_up = give_up
        self.ends_at_once: Callable[[], bool] = lambda: False  # whether a warning is for a process with nothing to save
        self._grace_s = grace_s
        self._first = 0.0
        self._deadline: float | None = None
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    @contextmanager
    def listening(self, signals: Sequence[signal.Signals]) -> Iterator[Preemption]:
        """Elsewhere than in the main thread, where Python handles no signals, nothing is heard."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        signals = not_ignored(signals)
        # Python runs handlers between two instructions, and a step may be one long call. This pipe is written at once.
        woken = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in signals}
        for number in signals:
            signal.siginterrupt(number, False)  # calls of libraries go on where they were
        watching = threading.Thread(target=self._watch, args=(frozenset(signals),), name="preemption", daemon=True)
        watching.start()
        if early := [number for number in _early if number in signals]:
            self._note(early[0], self._grace_s)
        try:
            yield self
        finally:
            _early.clear()
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.write(self._writer, b"\0")
            watching.join()
            os.close(self._reader)
            os.close(self._writer)

    def warn(self, signum: int) -> None:
        """Act as if this signal had come."""
        self._note(signum, self._grace_s)

    def is_due(self) -> bool:
        """Whether any rank was warned. Collective: all ranks hear the same, and have the shortest time of all."""
        import torch  # seconds, which a process that is warned while it starts does not have
        import torch.distributed as dist

        from checkpointing import Team

        noted = torch.tensor([self.signum], dtype=torch.int32)
        if dist.is_initialized():
            dist.all_reduce(noted, dist.ReduceOp.MAX)
        if int(noted) == 0:
            return False
        left = Team().together(lambda: None if self._deadline is None else self._deadline - time.monotonic())
        shortest = min((seconds for seconds in left if seconds is not None), default=self._grace_s)
        self._note(int(noted), shortest)
        return True

    def _note(self, signum: int, seconds: float) -> None:
        with self._lock:
            if self._deadline is None:
                self.signum, self._first, self._deadline = signum, time.monotonic(), time.monotonic() + seconds
        with contextlib.suppress(OSError):
            os.write(self._writer, b"\xff")  # the watch looks at the clock

    def _watch(self, signals: frozenset[signal.Signals]) -> None:
        while True:
            deadline = self._deadline
            ready, _, _ = select.select(
                [self._reader], [], [], None if deadline is None else max(0.0, deadline - time.monotonic())
            )
            if not ready:
                self.give_up(f"its {self._grace_s:g} seconds of grace have passed")
                return
            for byte in os.read(self._reader, 1):
                if byte == 0:
                    return
                if byte not in signals:
                    continue
                _heard.append(byte)
                if self.ends_at_once():
                    os._exit(AGAIN)
                if self._deadline is None:
                    self._note(byte, self._grace_s)
                elif time.monotonic() - self._first > ECHO_S:
                    self.give_up(f"{signal.Signals(byte).name} came again")
                    return


_early: list[int] = []  # what no run has taken up yet
_heard: list[int] = []  # all of it


def not_ignored(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """The signals that this process was not started to ignore, as `nohup` has SIGHUP ignored.

    What shells have every process in the background ignore is said by nobody: SIGINT and SIGQUIT are heard.
    """
    by_shells = (signal.SIGINT, signal.SIGQUIT)
    return [number for number in signals if number in by_shells or signal.getsignal(number) is not signal.SIG_IGN]


def note_early() -> None:
    """Note signals from the first moment of a process on: the run that listens later gets them."""
    for number in not_ignored((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)):
        signal.signal(number, _note_early)


def listen_no_more() -> None:
    """Stop listening at the end of a run: a signal that comes now ends the process."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is _note_early:
            signal.signal(number, signal.SIG_DFL)


def take_early() -> list[int]:
    """Take the signals that came before anybody listened, once."""
    taken = list(_early)
    _early.clear()
    return taken


def was_warned() -> bool:
    """Whether a signal came at any time: a launcher ends the others so when the first of its processes has failed."""
    return bool(_heard)


def _note_early(number: int, _: object) -> None:
    _early.append(number)
    _heard.append(number)


def warnings_of(name: str) -> list[signal.Signals]:
    """SIGTERM and the signal of this name, such as USR1. `ValueError` for a name of none that can be handled."""
    try:
        warning = signal.Signals[name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"]
    except KeyError:
        raise ValueError(name) from None
    if warning in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGCHLD):
        raise ValueError(name)
    return [signal.SIGTERM] if warning is signal.SIGTERM else [signal.SIGTERM, warning]
