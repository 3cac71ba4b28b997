"""What holds for every test: our own packages, no skips but for missing CUDA, and nothing left behind."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several processes share two cores
# Hidden, because a machine may have fewer than the processes that tests start; a test that needs one says so.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("EVERSHARD_TEST_GPU", "")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.harness import forks
from tests.harness.cluster import why_no_cluster
from tests.harness.leftovers import Before
from tests.harness.processes import wait_for
from tests.harness.worlds import SharedWorld

pytest_plugins = ["tests.harness.tiers"]
ALLOWED_SKIP = "needs CUDA"

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a machine that stalls for seconds says nothing of the code
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    wait = "how long what was started may take to be gone in the end (default 30)"
    parser.addoption("--leave-seconds", type=float, default=30.0, metavar="N", help=wait)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Session(), "session-of-tests")
    else:  # so that the first test that needs something does not pay for its import
        for name in ("torchao", "torch.utils._pytree"):  # which warn of kernels for other GPUs, once in every worker
            logging.getLogger(name).setLevel(logging.ERROR)
        forks.preload()
    config.stash[CUT_DOWN] = []


CUT_DOWN = pytest.StashKey[list[str]]()  # what was left out on this machine, in words


class _Session:
    """In the process that was started, whichever processes run the tests: what there was before and is there after."""

    def __init__(self) -> None:
        self._before = Before()
        self._server: forks.Server | None = None
        self._skips: dict[str, str] = {}
        self._cut_down: set[str] = set()
        self._left: list[str] = []

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if not session.config.option.collectonly:
            self._server = forks.Server()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skips[report.nodeid] = report.longrepr[2]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        self._cut_down |= set(getattr(node, "workeroutput", {}).get("cut_down", []))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._server is not None:
            self._server.stop()
        self._cut_down |= set(session.config.stash[CUT_DOWN])
        try:
            wait_for(
                lambda: not self._before.processes() and not self._before.memory(), session.config.option.leave_seconds
            )
        except AssertionError:
            self._left = [*self._before.processes(), *(f"/dev/shm/{name}" for name in self._before.memory())]
        unfit = any(ALLOWED_SKIP not in reason for reason in self._skips.values())
        if (self._left or unfit) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("skipped, cut down or left behind")
        for nodeid, reason in self._skips.items():
            terminalreporter.write_line(f"{nodeid}: {reason}")
        for line in sorted(self._cut_down):
            terminalreporter.write_line(line)
        for what in self._left:
            terminalreporter.write_line(f"LEFT BEHIND: {what}", red=True)
        terminalreporter.write_line(f"{len(self._skips)} skipped; long campaigns: pytest -m soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of SLURM run where a SLURM can be started."""
    of_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if of_slurm and (why := why_no_cluster()):
        config.hook.pytest_deselected(items=of_slurm)
        items[:] = [item for item in items if item not in of_slurm]
        config.stash[CUT_DOWN].append(f"NOT RUN: {len(of_slurm)} tests of SLURM: {why}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cut_down"] = session.config.stash[CUT_DOWN]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Each of them may have a world of four processes beside it."""
    return max(2, min(8, len(os.sched_getaffinity(0))))


@pytest.fixture(scope="session")
def world() -> Iterator[SharedWorld]:
    """The processes that tests share: forks that stay. Who asks for it is a world test."""
    shared = SharedWorld(forked=True)
    yield shared
    shared.stop()


@pytest.fixture(scope="session")
def processes() -> None:
    """Leave to start processes. Who asks for it is a journey."""


@pytest.fixture(scope="session")
def long() -> None:
    """Leave to take longer than a unit test may."""


@pytest.fixture(autouse=True)
def _outside_of_any_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are not ranks, even where pytest itself was started by a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """A program that a test runs in this process may ignore some, and what later tests start would ignore them too."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:  # as under nohup: what tests start must not ignore it as well
            signal.signal(number, lambda *_: None)
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
