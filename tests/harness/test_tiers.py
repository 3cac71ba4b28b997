"""Tiers follow from fixtures, who starts what it did not ask for fails, and options choose among them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness import tiers
from tests.harness.processes import ROOT
from tests.harness.tiers import BUDGETS_S, SHARES, _is_chosen, _Report

TESTS = """
import multiprocessing, subprocess, threading, time
import pytest
from tests.harness import speed

speed.SPIN_S = 1.0  # a slow machine is not what is tested here

def test_slow():
    time.sleep(2.3)

@pytest.fixture(scope="module")
def shared():
    time.sleep(2.3)

def test_quick(shared):
    pass

def test_starts_unasked():
    subprocess.run(["true"])

def test_spawns_unasked():
    multiprocessing.get_context("spawn").Process(target=print).start()

def test_starts_unasked_and_catches():
    try:
        subprocess.run(["true"])
    except BaseException:
        pass

def test_starts_unasked_in_a_thread():
    def start():
        try:
            subprocess.run(["true"])
        except BaseException:
            pass
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

@pytest.mark.usefixtures("long")
def test_slow_by_leave():
    time.sleep(2.3)

def test_starts(processes):
    subprocess.run(["true"])

@pytest.mark.smoke
def test_starts_in_every_run(processes):
    subprocess.run(["true"])

def test_of_a_world(world):
    assert len(world.run(int, 2)) == 2

def test_of_a_world_that_starts_something(world):
    subprocess.run(["true"])

@pytest.mark.soak
def test_soak(processes):
    pass
"""
UNASKED = {"starts_unasked", "spawns_unasked", "starts_unasked_and_catches", "starts_unasked_in_a_thread"}
DEFAULT = {"quick", "slow", "starts_in_every_run"} | UNASKED
REST = {"slow_by_leave", "starts", "of_a_world", "of_a_world_that_starts_something"}


def run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = ["-p", "tests.conftest", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(directory), "-c", os.devnull]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-m", "not soak", *words, *options, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return dict(re.findall(r"::test_(\w+) (PASSED|FAILED)", done.stdout))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "test_some.py").write_text(TESTS)
    return tmp_path


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_who_starts_what_it_did_not_ask_for_or_takes_too_long_fails(directory: Path) -> None:
    done = run(directory, "--deep")
    found = outcomes(done)
    assert found.keys() == DEFAULT | REST
    failed = {name for name, outcome in found.items() if outcome == "FAILED"}
    assert failed == UNASKED | {"slow", "of_a_world_that_starts_something"}
    assert "is a unit test. One that does asks for the fixture `processes`" in done.stdout
    assert "test_slow took 2.3 s, and a unit test takes 2.0 s at most on this machine" in done.stdout
    assert re.search(r"unit +6 ran in .*\n.*long +1 ran .*\n.*world +2 ran .*\n.*journey +2 ran", done.stdout)


@pytest.mark.usefixtures("processes")
def test_options_choose(directory: Path) -> None:
    done = run(directory, "--seconds", "1")
    assert done.returncode != 0 and re.search(r"NOT RUN: [1-9] chosen tests", done.stdout)
    assert re.search(r"FAILED: all of them would take about \d+ s, and may take 1 s", done.stdout)
    assert re.search(r"world +0 ran .* 2 left for later", done.stdout) and "pytest --deep" in done.stdout
    assert "slow_by_leave" not in outcomes(done) and outcomes(done).keys() < DEFAULT
    assert outcomes(run(directory, "--rest", "--deep")).keys() == REST
    assert outcomes(run(directory, str(directory / "test_some.py"))).keys() == DEFAULT | REST  # it is named
    assert "git diff fails here" in run(directory, "--reach", "nonsense").stderr


def test_five_heads_in_a_row_have_every_test_that_nothing_reaches_once() -> None:
    deep = [item_of(f"tests/test_x.py::test_{number}", "processes") for number in range(1000)]
    reached = [item_of("tests/test_y.py::test_0", "processes")]
    units, smoke = [item_of("tests/test_x.py::test_unit")], [item_of("tests/test_x.py::test_smoke", "world", "smoke")]
    chosen: Counter[str] = Counter()
    for head in range(7, 7 + SHARES):
        rest = SimpleNamespace(rest=True, deep=False, named=False, reached={"tests/test_y.py"}, turn=head % SHARES)
        these = [item.nodeid for item in [*deep, *reached, *units, *smoke] if _is_chosen(item, rest)]
        assert 100 < len(these) < 300 and reached[0].nodeid in these
        chosen.update(these)
        assert all(_is_chosen(item, SimpleNamespace(**{**vars(rest), "rest": False})) for item in [*units, *smoke])
    assert chosen == Counter({**{item.nodeid: 1 for item in deep}, reached[0].nodeid: SHARES})


def item_of(nodeid: str, fixture: str = "", mark: str = "") -> Any:
    return SimpleNamespace(nodeid=nodeid, fixturenames=[fixture], get_closest_marker=lambda name: name == mark or None)


@pytest.mark.parametrize("slow", [1.0, 1.9])
def test_a_budget_that_is_passed_fails_the_run(slow: float, monkeypatch: pytest.MonkeyPatch) -> None:
    report, session = reporting(slow, None, monkeypatch)
    for seconds, status in ((BUDGETS_S["world"] * slow, 0), (1.0, 1)):
        said: Any = SimpleNamespace(nodeid=f"test_{seconds}", duration=seconds, user_properties=[("tier", "world")])
        report.pytest_runtest_logreport(said)
        report.pytest_sessionfinish(session)
        assert session.exitstatus == status
    assert [line.partition(" tests")[0] for line in report.exceeded()] == ["world"]


@pytest.mark.parametrize(("slow", "status"), [(1.0, 1), (1.5, 1), (2.5, 0)])
def test_who_had_no_time_passes_only_where_the_machine_is_at_fault(
    slow: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what was chosen took 100 s, of 100 that it had."""
    report, session = reporting(slow, 100, monkeypatch)
    report._began -= 100
    said: Any = SimpleNamespace(nodeid="test_one", duration=100, user_properties=[("tier", "journey")])
    report.pytest_runtest_logreport(said)
    report.pytest_testnodedown(SimpleNamespace(workeroutput={"late": {"world": 1}}), None)
    report.pytest_sessionfinish(session)
    assert session.exitstatus == status and len(report.exceeded()) == status


def reporting(slow: float, seconds: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[_Report, Any]:
    monkeypatch.setattr("tests.harness.tiers.slowness", lambda: slow)
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr="not soak", seconds=seconds))
    return _Report(config), SimpleNamespace(exitstatus=0, config=SimpleNamespace(stash={}))


def test_the_clock_of_a_test_stands_still_while_it_waits_for_a_disk() -> None:
    """Whose syncs take as long as others let them."""
    began = tiers._clock()
    tiers.timed(time.sleep)(0.2)
    assert tiers._clock() - began < 0.1
    time.sleep(0.15)  # the control: what a test waits for of its own counts
    assert tiers._clock() - began >= 0.1
