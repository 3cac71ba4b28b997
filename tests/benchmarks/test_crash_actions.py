"""After a crash at any system call of what else a run does to its files: as it was before, or as it is meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.crash import campaign
from benchmarks.crash_actions import ACTIONS, Judge, action, record_actions
from benchmarks.crash_ranks import WITHOUT_SYNC, Recording, why_no_strace
from tests.conftest import CUT_DOWN

pytestmark = pytest.mark.usefixtures("processes")

CASES = [case for name in ACTIONS for case in (name, f"{name}.{WITHOUT_SYNC}")]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("actions").resolve()


@pytest.fixture(scope="module")
def recordings(top: Path) -> dict[str, Recording]:
    return record_actions(top, CASES) if why_no_strace() is None else {}


def test_no_crash_leaves_a_third_thing_and_without_syncs_it_does(
    top: Path, recordings: dict[str, Recording], request: pytest.FixtureRequest
) -> None:
    if why := why_no_strace():
        request.config.stash[CUT_DOWN].append(
            f"{why}: no crash of flush, prune, abandon, export and others is replayed"
        )
        return
    results = {case: campaign(one, 2, 0, Judge(action(top, case))) for case, one in recordings.items()}
    assert {name: results[name].violations for name in ACTIONS if results[name].violations} == {}
    assert [name for name in ACTIONS if not results[f"{name}.{WITHOUT_SYNC}"].violations] == []
    assert all("new" in results[name].outcomes and "old" in results[name].outcomes for name in ACTIONS)


def test_a_judge_sees_each_state_once(tmp_path: Path) -> None:
    judge = Judge(action(tmp_path, "identity"))
    assert judge.outcome({}) == "nobody knows whose the directory is"
    copy = {".identity.json": b'{"directory": "/elsewhere", "inode": 1, "run_id": "before"}'}
    assert judge.outcome(copy) == judge.outcome(copy) == "old" and judge.outcomes["old"] == 1
    assert judge.outcome({"checkpoints/": b"", **copy}) == "old"
    assert judge.outcome({".identity.json": b"{"}) == "nobody knows whose the directory is"
