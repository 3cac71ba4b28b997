"""Warnings are heard in the middle of a long call, by all ranks, once; and time runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager

import pytest
import torch.distributed as dist

from tests.harness.processes import ROOT, wait_for
from tests.harness.worlds import SharedWorld
from trainer.elastic.preemption import (
    ECHO_S,
    Preemption,
    listen_no_more,
    not_ignored,
    note_early,
    warnings_of,
    was_warned,
)

SIGNALS = warnings_of("USR1")


def listening(grace_s: float, given_up: list[str]) -> AbstractContextManager[Preemption]:
    return Preemption(grace_s, given_up.append).listening(SIGNALS)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_only_noted(signum: signal.Signals) -> None:
    before, given_up = signal.getsignal(signum), list[str]()
    with listening(100, given_up) as preemption:
        assert not preemption.is_due()
        os.kill(os.getpid(), signum)
        wait_for(lambda: preemption.signum == signum, 5)
        assert preemption.is_due() and preemption.is_due()
        os.kill(os.getpid(), signum)  # at once, as from a launcher that hands on what all have heard
        os.kill(os.getpid(), SIGNALS[0])
    assert given_up == [] and signal.getsignal(signum) == before


def test_grace_that_runs_out_and_a_signal_that_comes_again_give_up() -> None:
    given_up: list[str] = []
    with listening(0.2, given_up):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: given_up == ["its 0.2 seconds of grace have passed"], 5)
    with listening(100, given_up) as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: preemption.signum != 0, 5)
        began = time.monotonic()
        wait_for(lambda: time.monotonic() - began > ECHO_S, 5)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: given_up[1:] == ["SIGUSR1 came again"], 5)


@pytest.mark.usefixtures("processes")
def test_it_is_heard_in_the_middle_of_a_long_call() -> None:
    """Python's own handlers run between two instructions: this process is in one call for much longer."""
    script = """
import hashlib, os
from trainer.elastic.preemption import Preemption, warnings_of
def give_up(why):
    print("gave up", flush=True)
    os._exit(75)
with Preemption(0.5, give_up).listening(warnings_of("USR1")):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 75 and process.stdout.read() == "gave up\n"
        finally:
            process.kill()


def test_what_comes_before_a_run_listens_is_kept_for_it() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        note_early()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert was_warned()
        with listening(100, []) as preemption:
            assert preemption.is_due() and preemption.signum == signal.SIGUSR1
        with listening(100, []) as preemption:
            assert not preemption.is_due()
        listen_no_more()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hear(rank: int) -> tuple[bool, bool, float, int]:
    """One rank of several is warned, with two seconds left."""
    with Preemption(2.0 if dist.get_rank() == rank else 500.0, lambda why: None).listening(SIGNALS) as preemption:
        before = preemption.is_due()
        if dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: preemption.signum != 0, 5)
        dist.barrier()
        after = preemption.is_due()
        assert preemption._deadline is not None
        return before, after, preemption._deadline - time.monotonic(), preemption.signum


def test_all_ranks_hear_what_one_has_heard_and_have_as_little_time(world: SharedWorld) -> None:
    for before, after, left, signum in world.run(hear, 3, 1):
        assert not before and after and 0 < left <= 2.0 and signum == signal.SIGUSR1


def test_elsewhere_than_in_the_main_thread_nothing_is_heard_and_nothing_fails() -> None:
    found: list[bool] = []

    def run() -> None:
        with listening(1.0, []) as preemption:
            found.append(preemption.is_due())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert found == [False]


@pytest.mark.parametrize(
    ("name", "signals"),
    [
        ("USR1", [signal.SIGTERM, signal.SIGUSR1]),
        ("sigusr2", [signal.SIGTERM, signal.SIGUSR2]),
        ("TERM", [signal.SIGTERM]),
    ],
)
def test_signals_by_name(name: str, signals: list[signal.Signals]) -> None:
    assert warnings_of(name) == signals


@pytest.mark.parametrize("name", ["KILL", "INT", "STOP", "USR9", ""])
def test_what_cannot_warn_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        warnings_of(name)


def test_what_was_ignored_stays_ignored() -> None:
    """As SIGHUP under `nohup`; not what shells have every process in the background ignore."""
    signals = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        assert not_ignored(signals) == [signal.SIGTERM, signal.SIGINT]
        with Preemption(10.0, pytest.fail).listening(signals):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not_ignored(signals) == signals
