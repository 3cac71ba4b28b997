"""All benchmarks by one command: what is missed, what does not finish, and that each has a quick run that does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, QUICK_LIMIT_S, Outcome, main, run, table
from benchmarks.crash_ranks import why_no_strace
from tests.conftest import CUT_DOWN
from tests.harness.processes import ROOT

ROW = {"name": "a", "ours": 3.0, "ratio": None, "bar": 2, "better": "lower", "ok": False}


def test_what_is_missed_and_what_did_not_finish_is_in_the_table() -> None:
    lines = table(
        [
            Outcome("good", 1.0, [{**ROW, "ok": True}, {**ROW, "ok": None}]),
            Outcome("bad", 1.0, [ROW, {**ROW, "name": "b", "ratio": 1.25}]),
            Outcome("hangs", 900.0, why="it was ended after its 900 s"),
        ]
    ).splitlines()
    assert [line.split()[-5:] for line in lines[1:3]] == [
        ["1", "of", "1", "bars", "reached"],
        ["0", "of", "2", "bars", "reached"],
    ]
    assert lines[3].endswith("it was ended after its 900 s") and lines[4] == "missed:"
    assert lines[5:] == ["  bad: a: 3, bar 2 lower", "  bad: b: 1.25, bar 2 lower"]


def test_every_benchmark_is_among_them() -> None:
    commands = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "QUICK = " in path.read_text()}
    assert commands == set(NAMES) and len(NAMES) == len(commands)


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that hangs, and one that aborts after it has begun."""
    place = tmp_path / "benchmarks"
    place.mkdir()
    (place / "__init__.py").write_text("")
    (place / "hangs.py").write_text("import time; time.sleep(600)")
    (place / "aborts.py").write_text(
        "import os, sys; print('terminate called', file=sys.stderr, flush=True); os.abort()"
    )
    (place / "ends_late.py").write_text("import os; print('{\"rows\": []}', flush=True); os.abort()")
    monkeypatch.setattr("benchmarks.__main__.__file__", str(place / "__main__.py"))


@pytest.mark.smoke
@pytest.mark.usefixtures("processes", "silent")
def test_one_that_does_not_finish_is_told_and_ended() -> None:
    assert run("hangs", quick=True, limit_s=2).why == "it was ended after its 2 s"
    assert run("aborts", quick=True, limit_s=60).why == "it printed no report, status -6: terminate called"
    assert run("ends_late", quick=True, limit_s=60).why == "it ended with status -6 and 0 rows"


@pytest.mark.usefixtures("processes")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--quick", "--only", "scale"]) == 0
    shown = capsys.readouterr()
    (only,) = json.loads(shown.out)["benchmarks"]
    assert only["benchmark"] == "scale" and only["rows"] and only["why"] == ""
    assert "scale: finished" in shown.err and "no bar is missed" in shown.err


# The others have short runs in tests of their own, and these take half a minute each.
LATER = ("overhead", "planning", "checkpoint", "universal", "daily", "main_job", "matrix")


@pytest.mark.parametrize("name", ["engines", "crash", *(pytest.param(name, marks=pytest.mark.soak) for name in LATER)])
@pytest.mark.usefixtures("processes")
def test_a_quick_run_finishes_and_judges_nothing(name: str, request: pytest.FixtureRequest) -> None:
    if name in ("crash", "checkpoint") and (why := why_no_strace()):
        request.config.stash[CUT_DOWN].append(f"a quick run of benchmarks.{name} was not tried: {why}")
        return
    found = run(name, quick=True, limit_s=4 * QUICK_LIMIT_S)  # beside other tests
    assert found.why == "" and found.rows and found.missed == []
