"""The run directory: held by one run, written by nobody else, and brought back to where a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from checkpointing import Piece, save
from checkpointing.generations import scan
from checkpointing.storage import FileStorage
from trainer.compose import compose
from trainer.config import Config
from trainer.errors import Refused
from trainer.parallel.world import World
from trainer.resume import Start
from trainer.rundir import bring_back, hold_run_directory


def configure(directory: Path, *overrides: str) -> Config:
    return compose([f"run.dir={directory}", *overrides])


def write_generation(directory: Path, step: int) -> str:
    return save(directory / "checkpoints", step, [Piece("w", torch.ones(3), (0,), (3,))])


def test_one_run_at_a_time(tmp_path: Path) -> None:
    config = configure(tmp_path / "run")
    with hold_run_directory(config, World()) as lease:
        assert lease is not None and Path(config.checkpoint.dir).is_dir()
        with (
            pytest.raises(Refused, match=r"Another run uses .*type another run\.name"),
            hold_run_directory(config, World()),
        ):
            pass
    with hold_run_directory(config, World()) as lease:  # given back
        assert lease is not None


def test_other_ranks_and_dry_runs_neither_hold_nor_write(in_tmp: Path) -> None:
    with hold_run_directory(configure(in_tmp / "run"), World(rank=1, size=2)) as lease:
        assert lease is None
    with hold_run_directory(configure(in_tmp / "run", "dry_run=true"), World()) as lease:
        assert lease is None
    assert list(in_tmp.iterdir()) == []


def test_what_lies_after_the_step_is_undone(tmp_path: Path) -> None:
    config = configure(tmp_path)
    with hold_run_directory(config, World()):
        first, second = write_generation(tmp_path, 4), write_generation(tmp_path, 8)
        leftover = tmp_path / "checkpoints" / "step-00000012-00000000"
        leftover.mkdir()
        (leftover / "shard-00000.safetensors").write_bytes(b"never committed")
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 10)))
        told = bring_back(config, Start(8, config.checkpoint.dir, own=True), 4)  # 8 was wanted and could not be read
    assert told == [
        "the newest generation could not be read: going on from step 4",
        "5 steps after step 4 are rolled back, to metrics.discarded.jsonl",
    ]
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [1, 2, 3, 4]
    found = {g.name: g.abandoned for g in scan(FileStorage(tmp_path / "checkpoints"))}
    assert found == {first: False, second: True}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["run"]["dir"] == str(tmp_path)


def test_nothing_is_undone_where_nothing_lies_after(tmp_path: Path) -> None:
    config = configure(tmp_path)
    with hold_run_directory(config, World()):
        name = write_generation(tmp_path, 4)
        assert bring_back(config, Start(4, config.checkpoint.dir, own=True), 4) == [
            "metrics.jsonl ends at step 0: the lines up to step 4 are lost, the training is not"
        ]
    assert [(g.name, g.abandoned) for g in scan(FileStorage(tmp_path / "checkpoints"))] == [(name, False)]
