"""Which tests a run has, by what they start, and how long each tier may take: a plugin of pytest, from conftest.py.

    unit      starts no process; at most UNIT_S each
    long      asks for the fixture `long`: starts no process, and takes longer
    world     asks for the fixture `world`: processes that many tests share
    journey   asks for the fixture `processes`: launches, keepers, SLURM, and whatever else is a program

The tier of a test follows from its fixtures, and a test that starts what it did not ask for fails. `pytest` runs all
units, and those of the others that are marked `smoke`; `pytest --deep` runs everything but `soak`; `pytest --reach REV`
adds what the files changed since REV can reach. A file or a test that is named is run whole. `.ci/run` adds
`--rest --share`: what the first run left out, of that what is reached, and a fifth of what is not, which moves on with
each commit. With `--seconds N` nothing is begun after so long. Limits are those of a machine of known speed
(speed.py): a slower one is given as much more, and what it had no time for is said and left for later. Where the tests
would not have fitted on the machine that is meant either, the run has failed.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.util
import os
import statistics
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.reach import Graph, changed_since, place_in_history
from tests.harness.speed import slowness

UNIT_S = 2.0
SHARES = 5
# Seconds of a whole run, those of its workers together: what passes them fails the run, and is to be made faster.
BUDGETS_S = {"unit": 500, "long": 700, "world": 2000, "journey": 2200}
LONGEST = 15
MEASURED_EVERY_S = 20.0  # how fast the machine is, while tests run
TIERS = tuple(BUDGETS_S)
ASKED = {"processes": "journey", "world": "world", "long": "long"}  # which fixture makes which tier
# What auditing calls the start of a process; those of multiprocessing and of the server of tests are told by us.
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "tests.spawn", "tests.fork")
RANK = "tests.harness.rank"


def tier_of(item: pytest.Item) -> str:
    fixtures: list[str] = getattr(item, "fixturenames", [])
    return next((tier for fixture, tier in ASKED.items() if fixture in fixtures), "unit")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers", "which tests, by what they start")
    group.addoption("--deep", action="store_true", help="every test but soak")
    group.addoption("--reach", metavar="REV", help="also the tests that files changed since REV can reach")
    group.addoption("--share", action="store_true", help=f"also one in {SHARES} of the others, by the head's place")
    group.addoption("--rest", action="store_true", help="leave out what a run without options has")
    group.addoption("--seconds", type=int, metavar="N", help="begin no test after so long")


def pytest_configure(config: pytest.Config) -> None:
    for tier in TIERS:
        config.addinivalue_line("markers", f"{tier}: set by the fixtures of a test (tests/harness/tiers.py)")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Report(config), "tiers-report")
    config.pluginmanager.register(_Guard(), "tiers-guard")
    config.stash[LATE] = Counter()
    if config.option.seconds is not None:
        given: dict[str, Any] = getattr(config, "workerinput", {})  # a worker of xdist ends when the others do
        deadline = _Deadline(given.get("deadline", time.monotonic() + config.option.seconds), config.stash[LATE])
        config.pluginmanager.register(deadline, "tiers-deadline")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(tier_of(item))
        item.user_properties.append(("tier", tier_of(item)))
    choice = _Choice(config)
    left = [item for item in items if not _is_chosen(item, choice)]
    if left:
        gone = set(left)
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=left)
    items.sort(key=choice.place_of)
    config.stash[LEFT] = Counter(tier_of(item) for item in left if not item.get_closest_marker("soak"))


LEFT = pytest.StashKey[Counter[str]]()  # by tier: not chosen
LATE = pytest.StashKey[Counter[str]]()  # by tier: chosen, and there was no time


class _Choice:
    """What the options of a run ask for."""

    def __init__(self, config: pytest.Config) -> None:
        options = config.option
        self.deep, self.rest, self.share = options.deep, options.rest, options.share
        # Tests of a named file, or of marks or words that somebody typed, are meant as they are.
        self.named = any(str(word).partition("::")[0].endswith(".py") for word in config.args)
        self.named |= options.markexpr not in ("", "not soak") or bool(options.keyword)
        self.reached: set[str] = set()
        if options.reach:
            try:
                changed = changed_since(options.reach)
                self.reached = Graph(gone=changed).reached_by(changed)
            except ValueError as error:
                raise pytest.UsageError(f"--reach: {error}. Name a commit of this checkout, or use --deep.") from None
        try:
            self.turn = place_in_history() % SHARES if self.share else None
        except ValueError as error:
            raise pytest.UsageError(f"--share: {error}. Run it in a checkout, or use --deep.") from None

    def place_of(self, item: pytest.Item) -> tuple[int, int]:
        """The turn of this head first, so that what there is no time for is another part for every head."""
        after = 0 if self.turn is None else (turn_of(item.nodeid) - self.turn) % SHARES
        return after, -TIERS.index(tier_of(item))


def _is_chosen(item: pytest.Item, choice: _Choice) -> bool:
    default = tier_of(item) == "unit" or item.get_closest_marker("smoke") is not None
    if choice.rest:
        if default:
            return False
    elif default:
        return True
    if choice.deep or choice.named:
        return True
    file = item.nodeid.partition("::")[0]
    return file in choice.reached or (choice.turn is not None and turn_of(item.nodeid) == choice.turn)


def turn_of(nodeid: str) -> int:
    """In which of `SHARES` heads in a row a test that nothing reaches is run."""
    return zlib.crc32(nodeid.encode()) % SHARES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One test after another to whoever is free; those of a file that share what a fixture has made, to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def shares(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text()

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares(file) else nodeid

    return ByFile(config, log)


class _Guard:
    """In every process that runs tests: nothing is started that was not asked for, and units are quick."""

    def __init__(self) -> None:
        self._item: pytest.Item | None = None
        self._unasked = ""  # what this test started without asking: also where a thread did, or somebody caught it
        self._shared = 0.0  # seconds of what this test made for others too
        self._depth = 0
        spawn = multiprocessing.util.spawnv_passfds

        def told(path: Any, arguments: Any, descriptors: Any) -> int:
            if not any("resource_tracker" in str(word) for word in arguments):  # once a process, whoever is first
                sys.audit("tests.spawn", arguments)
            return spawn(path, arguments, descriptors)

        multiprocessing.util.spawnv_passfds = told
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._item is None or event not in STARTS or (tier := tier_of(self._item)) == "journey":
            return
        if tier == "world" and event == "tests.fork" and RANK in arguments[0]:
            return
        words = arguments[1] if event == "subprocess.Popen" else arguments
        self._unasked = (
            f"{self._item.nodeid} starts a process ({event} {words}) and is a {tier} test. One that does asks for the "
            "fixture `processes`, or for `world` and leaves it to that."
        )
        self._item = None  # told once; what handles the exception may look for a program itself
        raise StartsUnasked(self._unasked)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._item, self._unasked, self._shared, self._depth = item, "", 0.0, 0
        item.stash[BEGAN] = _clock()
        try:
            return (yield)
        finally:
            self._item = None

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        """What several tests share is made by whichever of them comes first, and is not its time."""
        if fixturedef.scope == "function":
            return (yield)
        began, self._depth = _clock(), self._depth + 1
        try:
            return (yield)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._shared += _clock() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
        report: pytest.TestReport = yield
        if self._unasked and report.when != "setup" and report.passed:
            report.outcome, report.longrepr = "failed", self._unasked
            self._unasked = ""
        if report.when != "call" or not report.passed or tier_of(item) != "unit" or item.get_closest_marker("soak"):
            return report
        seconds = _clock() - item.stash[BEGAN] - self._shared
        if seconds > UNIT_S and seconds > (limit := UNIT_S * slowness()):
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {seconds:.1f} s, and a unit test takes {limit:.1f} s at most on this machine. "
                "Make it smaller, or let it ask for the fixture `long`."
            )
        return report


class _Deadline:
    """In every process that runs tests: what has not begun in time is counted, and not run."""

    def __init__(self, end: float, late: Counter[str]) -> None:
        self._end, self._late = end, late

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["deadline"] = self._end

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if time.monotonic() < self._end:
            return None
        self._late[tier_of(item)] += 1
        return True


BEGAN = pytest.StashKey[float]()


class StartsUnasked(BaseException):
    """Not for tests to catch."""


_on_disk = 0.0  # seconds that this process's main thread has waited for syncs


def timed(sync: Callable[[Any], None]) -> Callable[[Any], None]:
    """A call of the system's that makes a file durable, which counts how long it took."""

    def waiting(file: Any) -> None:
        global _on_disk
        began = _clock()  # for a core it waits as well, and that is not counted twice
        try:
            sync(file)
        finally:
            if threading.current_thread() is threading.main_thread():
                _on_disk += _clock() - began

    return waiting


os.fsync, os.fdatasync = timed(os.fsync), timed(os.fdatasync)


def _clock() -> float:
    """Seconds, without those for which this thread waited for a core or for a disk: they say nothing of the test."""
    waited = _on_disk
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited += int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return time.perf_counter() - waited


class _Report:
    """In the process that tells: what ran and how long, what was left, and whether a budget was passed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._began = time.monotonic()
        self._seconds: dict[str, float] = defaultdict(float)
        self._tier: dict[str, str] = {}
        self._left: Counter[str] = Counter()
        self._late: Counter[str] = Counter()
        self._slow = [slowness()]
        self._measured = self._began
        self._took = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self._seconds[name] += report.duration
        self._tier[name] = dict(report.user_properties).get("tier", "unit")  # type: ignore[arg-type]
        if time.monotonic() - self._measured > MEASURED_EVERY_S:
            self._slow.append(slowness())
            self._measured = time.monotonic()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker of xdist has ended: all have chosen the same, and each had no time for some of its own."""
        output = getattr(node, "workeroutput", {})  # none of one that crashed
        self._left = Counter(output["left"]) if "left" in output else self._left
        self._late.update(output.get("late", {}))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._took = time.monotonic() - self._began
        if not self._left:
            self._left = session.config.stash.get(LEFT, Counter())
        self._late.update(session.config.stash.get(LATE, Counter()))
        if session.exitstatus == 0 and self.exceeded():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def exceeded(self) -> list[str]:
        """Which limits this run has passed, or would have, had it been on the machine that they are meant for."""
        if self._config.option.markexpr == "soak":
            return []
        slow, spent, limit = statistics.median(self._slow), self._spent(), self._config.option.seconds
        told = [
            f"{tier} tests took {spent[tier]:.0f} s, and may take {budget * slow:.0f} s: make some faster"
            for tier, budget in BUDGETS_S.items()
            if spent[tier] > budget * slow
        ]
        if self._late:
            ran = Counter(self._tier.values())
            mean = sum(spent.values()) / max(ran.total(), 1)
            left = sum(count * (spent[tier] / ran[tier] if ran[tier] else mean) for tier, count in self._late.items())
            whole = self._took / slow * (1 + left / max(sum(spent.values()), 1e-9))
            if whole > limit:
                told.append(f"all of them would take about {whole:.0f} s, and may take {limit} s")
        return told

    def _spent(self) -> dict[str, float]:
        spent = dict.fromkeys(TIERS, 0.0)
        for name, seconds in self._seconds.items():
            spent[self._tier[name]] += seconds
        return spent

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        line = terminalreporter.write_line
        if len(self._seconds) > LONGEST:
            terminalreporter.section("longest")
            for name, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])[:LONGEST]:
                line(f"{seconds:7.1f} s  {self._tier[name]:8} {name}")
        terminalreporter.section("tiers")
        spent, slow = self._spent(), statistics.median(self._slow)
        for tier in TIERS:
            count = sum(found == tier for found in self._tier.values())
            left = self._left[tier] + self._late[tier]
            line(
                f"{tier:8} {count:5} ran in {spent[tier]:6.0f} s of processes (budget {BUDGETS_S[tier] * slow:.0f} s), "
                f"{left:5} left for later"
            )
        line(f"{self._took:.0f} s in all, on a machine that takes {slow:.1f} times as long as the limits are meant for")
        if self._late:
            line(f"NOT RUN: {self._late.total()} chosen tests, for which this machine had no time", yellow=True)
        for told in self.exceeded():
            line(f"FAILED: {told}", red=True)
        if self._left or self._late:
            line("what was left: pytest --deep; what a change can reach: pytest --reach REV; or name its file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = dict(session.config.stash.get(LEFT, Counter()))
        session.config.workeroutput["late"] = dict(session.config.stash.get(LATE, Counter()))
