"""What holds for every test: our own packages, no skips but for missing CUDA, and nothing left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several processes share two cores
# Hidden, because a machine may have fewer than the processes that tests start; a test that needs one says so.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("EVERSHARD_TEST_GPU", "")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.cluster import why_no_cluster
from tests.worlds import WORLD

ROOT = Path(__file__).resolve().parents[1]
ALLOWED_SKIP = "needs CUDA"
LAST = "tests/test_leftovers.py"

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a machine that stalls for seconds says nothing of the code
settings.load_profile("untimed")
_skips: dict[str, str] = {}
CUT_DOWN: list[str] = []  # what a test left out on this machine, in words


def pytest_configure(config: pytest.Config) -> None:
    config.shared_memory_before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The test of what is left behind runs when everything else has; those of SLURM where a SLURM can be started."""
    items.sort(key=lambda item: item.nodeid.startswith(LAST))
    of_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if of_slurm and (why := why_no_cluster()):
        config.hook.pytest_deselected(items=of_slurm)
        items[:] = [item for item in items if item not in of_slurm]
        CUT_DOWN.append(f"NOT RUN: {len(of_slurm)} tests of SLURM: {why}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skips[report.nodeid] = report.longrepr[2]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("skipped or cut down")
    for nodeid, reason in _skips.items():
        terminalreporter.write_line(f"{nodeid}: {reason}")
    for line in CUT_DOWN:
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{len(_skips)} skipped; deselected soak tests: pytest -m soak")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    WORLD.stop()
    if any(ALLOWED_SKIP not in reason for reason in _skips.values()) and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


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
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
