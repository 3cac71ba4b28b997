"""The run directory: held by one run, written by nobody else, and brought back to where a run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from checkpointing import Piece, save
from checkpointing.generations import candidates, scan
from checkpointing.lease import Lease
from checkpointing.storage import FileStorage
from trainer import rundir
from trainer.compose import compose
from trainer.errors import Refused, TrainingFailed
from trainer.options.config import Config
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
        f"1 generations are set aside, and deleted when checkpoint.keep=2 others are there: {second}",
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


def test_two_runs_do_not_share_checkpoints(tmp_path: Path) -> None:
    shared = f"checkpoint.dir={tmp_path / 'shared'}"
    with hold_run_directory(configure(tmp_path / "a", shared), World()):
        with (
            pytest.raises(Refused, match=r"Another run uses .*shared"),
            hold_run_directory(configure(tmp_path / "b", shared), World()),
        ):
            pass
        with hold_run_directory(configure(tmp_path / "b"), World()):  # what was taken is given back
            pass


@pytest.mark.parametrize("at", ["clear_leftovers", "turn_away_from", "roll_back"])
def test_a_crash_while_it_is_brought_back_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Going back to step 4 of 9 is cut short: either nothing has happened, or it is done the next time."""
    config = configure(tmp_path)
    with hold_run_directory(config, World()):
        for step in (4, 6, 8):
            write_generation(tmp_path, step)
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 10)))

        def die(*arguments: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(rundir, at, die)
            bring_back(config, Start(4, config.checkpoint.dir, own=True), 4)
        goes_on_from = candidates(FileStorage(config.checkpoint.dir))[0].step
        assert goes_on_from == (4 if at == "roll_back" else 8)
        told = bring_back(config, Start(goes_on_from, config.checkpoint.dir, own=True), goes_on_from)
    assert not any("are lost" in line for line in told)
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == list(range(1, goes_on_from + 1))


def test_lines_that_are_missing_are_said(tmp_path: Path) -> None:
    config = configure(tmp_path)
    with hold_run_directory(config, World()):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        (line,) = bring_back(config, Start(4, config.checkpoint.dir, own=True), 4)
    assert line == "metrics.jsonl ends at step 1: the lines up to step 4 are lost, the training is not"


def test_a_full_disk_is_one_paragraph_and_room_is_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path)
    leftover = tmp_path / "checkpoints" / "step-00000012-00000000"

    def full(run_dir: Path, step: int, spare: Path) -> tuple[int, int]:
        assert not leftover.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rundir, "roll_back", full)
    with hold_run_directory(config, World()):
        leftover.mkdir()
        (leftover / "shard-00000.safetensors").write_bytes(b"never committed")
        with pytest.raises(Refused, match=r"cannot be written: No space left on device\. Make room, or type run\.dir="):
            bring_back(config, Start(4, config.checkpoint.dir, own=True), 4)


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.EIO, TrainingFailed, "Start the same command again"),
        (errno.ESTALE, TrainingFailed, "Start the same command again"),
        (errno.EDQUOT, Refused, "Make room"),
        (errno.EROFS, Refused, "Make it writable"),
    ],
)
def test_what_may_pass_by_itself_is_a_failure_and_the_rest_a_refusal(
    number: int, kind: type[Exception], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor tries the one again, and not the other."""

    def fails(run_dir: Path, step: int, spare: Path) -> tuple[int, int]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rundir, "roll_back", fails)
    config = configure(tmp_path)
    with hold_run_directory(config, World()), pytest.raises(kind, match=f"cannot be written: .*{remedy}.*, or type"):
        bring_back(config, Start(4, config.checkpoint.dir, own=True), 4)


def test_another_runs_checkpoint_sets_all_of_ones_own_aside(tmp_path: Path) -> None:
    config = configure(tmp_path / "run")
    with hold_run_directory(config, World()):
        write_generation(tmp_path / "run", 2)
        bring_back(config, Start(8, str(tmp_path / "other"), own=False), 8)
        assert candidates(FileStorage(config.checkpoint.dir)) == []


def test_a_refused_command_leaves_no_directories_behind(tmp_path: Path) -> None:
    for name, left in (("typo", False), ("there", True)):
        if left:
            (tmp_path / name).mkdir()
        with pytest.raises(Refused), hold_run_directory(configure(tmp_path / name), World()):
            raise Refused("no")
        assert (tmp_path / name).exists() == left
    with pytest.raises(KeyError), hold_run_directory(configure(tmp_path / "failed"), World()):
        raise KeyError
    assert (tmp_path / "failed" / "checkpoints").exists()


def test_a_refused_command_leaves_a_run_that_has_come_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the end of the lease and the clearing up."""
    config, others = configure(tmp_path / "run"), list[Lease]()
    release = Lease.release

    def released(lease: Lease) -> None:
        release(lease)
        others.append(Lease.acquire(lease.storage))

    monkeypatch.setattr(Lease, "release", released)
    with pytest.raises(Refused), hold_run_directory(config, World()):
        raise Refused("no")
    monkeypatch.undo()
    for other in others:
        other.check(anew=True)
        other.release()
    assert len(others) == 2


def test_one_directory_may_serve_for_both(tmp_path: Path) -> None:
    config = configure(tmp_path, f"checkpoint.dir={tmp_path}/../{tmp_path.name}")
    with hold_run_directory(config, World()) as lease:
        assert lease is not None
        with pytest.raises(Refused, match="Another run uses"), hold_run_directory(config, World()):
            pass


def test_a_link_to_what_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("runs", "runs/r"):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "purged")
        config = configure(tmp_path / "runs" / "r")
        message = f"{name} is a link to .*purged, which is not there"
        with pytest.raises(Refused, match=message), hold_run_directory(config, World()):
            pass
        (tmp_path / name).unlink()
