"""After a crash at any system call of a save: the old generation or the new one, and the controls are found out.

Where processes can be traced, ranks of their own are recorded; elsewhere the same replay is fed by threads of this one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import crash
from benchmarks.crash import Judge, campaign
from benchmarks.crash_model import Disk, Operation
from benchmarks.crash_ranks import (
    COMMIT_FIRST,
    NEW,
    OLD,
    SOUND,
    WITHOUT_SYNC,
    Recording,
    objects,
    pieces,
    record,
    save_step,
    state,
    why_no_strace,
)
from checkpointing import save, storage
from checkpointing.collective import Team
from checkpointing.lease import Lease
from checkpointing.storage import FileStorage
from tests.benchmarks import recorded
from tests.benchmarks.recorded import record_here

pytestmark = pytest.mark.usefixtures("processes")

CASES = (SOUND, WITHOUT_SYNC, COMMIT_FIRST)
Recordings = dict[str, Recording]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    top = tmp_path_factory.mktemp("crash").resolve()
    return {case: record_here(top, 2, case) for case in CASES}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Recordings:
    if why_no_strace():
        return request.getfixturevalue("here")  # type: ignore[no-any-return]
    return record(tmp_path_factory.mktemp("traced"), 2, CASES)


@pytest.mark.parametrize("recorder", ["recordings", "here"])
def test_no_crash_leaves_a_third_thing(recorder: str, request: pytest.FixtureRequest) -> None:
    result = campaign(request.getfixturevalue(recorder)[SOUND], samples=4)
    assert result.violations == ()
    assert set(result.outcomes) == {"old", "new"}
    assert result.num_operations >= 20 and result.num_prefixes == result.num_operations + 1
    assert result.num_distinct > result.num_prefixes


@pytest.mark.parametrize("recorder", ["recordings", "here"])
def test_a_save_without_syncs_is_found_out(recorder: str, request: pytest.FixtureRequest) -> None:
    recording = request.getfixturevalue(recorder)[WITHOUT_SYNC]
    assert not [op for op in recording.operations if op.kind == "sync"]
    found = campaign(recording, samples=1).violations
    assert any("returned" in line and line.endswith("all un-synced is lost: old") for line in found)
    assert any(line.endswith("half of the new one is committed") for line in found)


def test_a_commit_before_the_shards_is_found_out(recordings: Recordings) -> None:
    found = campaign(recordings[COMMIT_FIRST], samples=0).violations
    assert any(line.endswith("as after a kill: half of the new one is committed") for line in found)


def test_one_kind_of_sync_left_out_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents are synced, but no directory is: what was saved can vanish as a whole."""
    monkeypatch.setattr(storage, "sync_directory", lambda path: None)
    found = campaign(record_here(tmp_path, 2, SOUND), samples=0).violations
    assert any("returned" in line and line.endswith("un-synced names are lost: old") for line in found)


def test_files_that_come_and_go_around_a_save_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_under_a_lease(step: int, directory: Path, team: Team, case: str) -> None:
        lease = Lease.acquire(FileStorage(directory / "leases")) if team.rank == 0 else None
        save_step(step, directory, team, case)
        if lease is not None:
            lease.release()

    monkeypatch.setattr(recorded, "save_step", lambda *a: save_under_a_lease(*a) if len(a) == 4 else save_step(*a))
    recording = recorded.record_here(tmp_path, 2, SOUND)
    assert {op.kind for op in recording.operations if op.path.startswith("leases")} >= {"mkdir", "link", "unlink"}
    assert campaign(recording, samples=2).violations == ()


def test_a_recording_that_is_not_whole_is_refused(here: Recordings) -> None:
    whole = here[SOUND]
    write = next(op for op in whole.operations if op.kind == "write" and "shard" in op.path)
    without = [op for op in whole.operations if op is not write]
    with pytest.raises(ValueError, match=f"after its replay these differ.*{write.path}"):
        campaign(Recording(whole.start, without, whole.end, 2), samples=0)
    unfinished = [op for op in whole.operations if op != Operation("returned", rank=1, began=op.began, ended=op.ended)]
    with pytest.raises(ValueError, match="save returned on 1 of 2 ranks"):
        campaign(Recording(whole.start, unfinished, whole.end, 2), samples=0)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_the_judge_tells_what_it_is_given(tmp_path: Path) -> None:
    judge = Judge()
    assert judge.outcome({}).startswith("NotFoundError: ")
    save_step(OLD, tmp_path, Team())
    old = Disk.at(tmp_path).listing()
    assert judge.outcome(old) == "old"
    shard = next(name for name in old if name.endswith(".safetensors"))
    assert judge.outcome(old | {shard: old[shard][:-1]}).startswith("DamagedError: every generation")
    save_step(NEW, tmp_path, Team())
    both = Disk.at(tmp_path).listing()
    assert judge.outcome(both) == "new"
    newer = next(name for name in both.keys() - old.keys() if name.endswith(".safetensors"))
    assert judge.outcome(both | {newer: flipped(both[newer])}) == "half of the new one is committed"
    save(tmp_path, 3, pieces(state(NEW), 0, 1), objects(OLD))  # each in full, but not of one step
    assert judge.outcome(Disk.at(tmp_path).listing()) == "a mixture of both"
    one_old = state(NEW) | {"buffer/counts": state(OLD)["buffer/counts"]}
    save(tmp_path, 4, pieces(one_old, 0, 1), objects(NEW))
    assert judge.outcome(Disk.at(tmp_path).listing()) == "a mixture of both"
    assert judge.outcomes == {"old": 1, "new": 1, "half of the new one is committed": 1, "a mixture of both": 2} | {
        outcome: 1 for outcome in judge.outcomes if "Error: " in outcome
    }


def test_what_is_printed(here: Recordings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(crash, "why_no_strace", lambda: None)
    monkeypatch.setattr(crash, "record", lambda top, size, cases: {case: here[case] for case in cases})
    monkeypatch.setattr(sys, "argv", ["crash", "--json", "--samples", "1", "--break", COMMIT_FIRST])
    assert crash.main() == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["name"] == "violations found, control with COMMIT before shards, 2 ranks" and row["ok"] is True
    # The same save, judged as if it were ours, misses the bar.
    monkeypatch.setattr(crash, "run_actions", lambda samples, seed: {})
    monkeypatch.setattr(crash, "record", lambda top, size, cases: {SOUND: here[COMMIT_FIRST]})
    monkeypatch.setattr(sys, "argv", ["crash", "--json", "--samples", "1"])
    assert crash.main() == 1
    *_, last = json.loads(capsys.readouterr().out)["rows"]
    assert last["name"] == "violations, save, 2 ranks" and last["ok"] is False
    monkeypatch.setattr(crash, "why_no_strace", lambda: "strace is not installed")
    with pytest.raises(SystemExit):
        crash.main()
    assert "strace is not installed; tests/benchmarks/test_crash.py" in capsys.readouterr().err
