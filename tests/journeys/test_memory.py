"""A run that dies goes on from memory, under another layout too; and from the disk where memory is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointing.generations import newest
from checkpointing.storage import FileStorage
from tests.harness.processes import wait_for
from tests.harness.runs import SMALL, assert_same_run, kill_when, launch, rows
from trainer.compose import compose
from trainer.resume import memory_directory

pytestmark = pytest.mark.usefixtures("processes")

COMMON = [*SMALL, "train.steps=30", "data.log_ids=true", "checkpoint.memory.every=1", "checkpoint.memory.keep_s=20"]


def in_memory(run_dir: Path, *overrides: str) -> Path:
    found = memory_directory(compose([f"run.dir={run_dir}", *overrides]))
    assert found is not None
    return found


def resumes(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in rows(run_dir, "events.jsonl") if event["event"] == "resume"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never killed."""
    directory = tmp_path_factory.mktemp("whole") / "a"
    assert launch(1, [*COMMON, f"run.dir={directory}", "checkpoint.memory.every=0"]).returncode == 0
    return directory


@pytest.fixture
def no_memory_left() -> Iterator[list[Path]]:
    roots: list[Path] = []
    yield roots
    wait_for(lambda: not any(root.exists() for root in roots), 60)


@pytest.mark.smoke
def test_killed_on_three_sharded_and_resumed_from_memory_on_two(
    tmp_path: Path, whole: Path, no_memory_left: list[Path]
) -> None:
    a, b = whole, tmp_path / "b"
    killed = kill_when(b, 3, [*COMMON, f"run.dir={b}", "parallel=fsdp", "checkpoint.every=0"], step=12)
    no_memory_left.append(in_memory(b))
    shutil.rmtree(b / "checkpoints")
    done = launch(2, [*COMMON, f"run.dir={b}", "parallel=ddp", "checkpoint.every=0"])
    assert done.returncode == 0, done.stderr
    assert_same_run(rows(a), rows(b), last=30)
    (resume,) = resumes(b)
    assert resume["tier"] == "memory" and 0 <= killed - resume["step"] <= 1
    assert all("snapshot_age_s" in row for row in rows(b)[resume["step"] + 1 :])


@pytest.mark.parametrize("damage", ["flipped", "of another run"])
def test_damaged_memory_is_passed_over_for_the_disk(
    tmp_path: Path, whole: Path, no_memory_left: list[Path], damage: str
) -> None:
    a, b = whole, tmp_path / "b"
    mine = [*COMMON, f"run.dir={b}", "checkpoint.every=5", f"checkpoint.memory.dir={tmp_path / 'memory'}"]
    kill_when(b, 1, mine, step=12)
    root = in_memory(b, f"checkpoint.memory.dir={tmp_path / 'memory'}")
    no_memory_left.append(root)
    if damage == "flipped":
        for shard in root.glob("step-*/shard-*"):
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
    else:
        events = b / "events.jsonl"
        events.write_text(events.read_text().replace('"run_id": "', '"run_id": "x'))
    durable = newest(FileStorage(b / "checkpoints"))
    assert durable is not None
    done = launch(1, mine)
    assert done.returncode == 0, done.stderr
    assert ("is of another run" if damage == "of another run" else "is damaged") in done.stdout + done.stderr
    (resume,) = resumes(b)
    # The keeper may have flushed one more before it was looked at.
    assert resume["tier"] == "durable" and resume["step"] >= durable.step and resume["step"] % 5 == 0
    assert_same_run(rows(a), rows(b), last=30)
