"""The start of a run on all ranks together: its directory is held, and its state is that of the generation loaded."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from checkpointing.lease import Lease
from checkpointing.storage import FileStorage
from tests.harness.runs import SMALL, rows
from trainer.compose import compose
from trainer.errors import Refused
from trainer.job import read
from trainer.parallel.world import World
from trainer.run import run
from trainer.starting import Started, start_together, take_snapshots

BASE = [*SMALL, "train.steps=12", "checkpoint.every=4", "eval.every=5"]


def go(run_dir: Path, *overrides: str) -> None:
    assert run(compose([*BASE, f"run.dir={run_dir}", *overrides])) == 0


def begun(run_dir: Path, held: ExitStack, *overrides: str) -> Started:
    job, plan = read(compose([*BASE, f"run.dir={run_dir}", *overrides]), World(), torch.device("cpu"))
    return start_together(job, plan, held)


@pytest.mark.smoke
@pytest.mark.usefixtures("long")
def test_it_starts_where_the_newest_generation_ends_and_holds_the_directory(tmp_path: Path) -> None:
    go(tmp_path, "train.steps=4")
    with ExitStack() as held:
        started = begun(tmp_path, held, "train.steps=8", "resume_allow=[train.steps]")
        assert started.start.step == started.state["step"] == 4 and started.tier == "durable"
        assert started.leases is not None and started.memory is None and take_snapshots(started, "id") is None
        with pytest.raises(Refused, match="Another run uses"):
            begun(tmp_path, held)
    with ExitStack() as held:
        assert begun(tmp_path, held, "resume=none").state == {}


def test_a_second_run_in_the_directory_is_refused(tmp_path: Path) -> None:
    go(tmp_path)
    before = rows(tmp_path)
    held = Lease.acquire(FileStorage(tmp_path / ".lease"))
    with pytest.raises(Refused, match=r"Another run uses .*: process \d+ on .* holds .*\. Wait until it has ended"):
        go(tmp_path, "train.steps=20")
    held.release()
    assert rows(tmp_path) == before


@pytest.mark.usefixtures("long")
def test_settings_are_checked_against_the_generation_that_is_loaded_in_the_end(tmp_path: Path) -> None:
    go(tmp_path, "train.steps=8", "optimizer.clip=0.5")
    go(tmp_path, "optimizer.clip=0.7", "resume_allow=[optimizer.clip]")
    shard = next((tmp_path / "checkpoints").glob("step-00000012-*/shard-00000.safetensors"))
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Refused, match=r"optimizer\.clip \(was 0\.5, is 0\.7\)"):
        go(tmp_path, "optimizer.clip=0.7")
