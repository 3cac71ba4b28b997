"""Copying in the background: what is waited for, and on a GPU what is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import Piece, load
from checkpointing.collective import Team
from checkpointing.memory import Snapshotter, copying
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import Message
from tests.checkpointing.memory.keepers import WAIT_S, keeping
from tests.checkpointing.memory.test_snapshotter import assert_equal, loaded, rows_of
from tests.conftest import ALLOWED_SKIP
from tests.harness.runs import ROOT, environment


def test_a_keeper_that_says_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "ASK_S", 0.2)
    with keeping(tmp_path / "memory") as keeper:
        monkeypatch.setattr(keeper.protocol, "_begin", lambda *_: [])
        snapshots = Snapshotter(None, tmp_path / "memory")
        snapshots.snapshot(1, rows_of(0, 1, 1))
        snapshots.fence()
        assert (outcome := snapshots.settle()) is not None and outcome.why == "the keeper did not answer in time"
        snapshots.close()


def test_closing_in_the_middle_of_a_checked_snapshot_waits_for_no_fence(tmp_path: Path) -> None:
    """As when training fails between a snapshot and the next step."""
    with keeping(tmp_path / "memory"):
        snapshots = Snapshotter(None, tmp_path / "memory", check_fence=True)
        snapshots.snapshot(1, rows_of(0, 1, 1))
        closing = threading.Thread(target=snapshots.close)
        closing.start()
        closing.join(WAIT_S)
        assert not closing.is_alive()


def test_the_background_takes_part_in_no_collective(tmp_path: Path) -> None:
    """On training's process groups one would be matched with another one of training."""
    callers = set[str]()

    class Watched(Team):
        def together(self, function: Any, *, long: bool = False) -> Any:
            callers.add(threading.current_thread().name)
            return super().together(function, long=long)

    with keeping(tmp_path / "memory"):
        snapshots = Snapshotter(tmp_path / "disk", tmp_path / "memory", Watched())
        for step in (1, 2, 3):
            snapshots.snapshot(step, rows_of(0, 1, step), durable=step == 2)
            assert (outcome := snapshots.settle()) is not None and outcome.generation
        assert snapshots.wait_durable(WAIT_S)
        snapshots.close()
    assert callers == {threading.current_thread().name}


@pytest.mark.parametrize("keeper_is_quick", [False, True])
def test_one_that_cannot_be_copied_costs_that_snapshot(
    keeper_is_quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bad page")

    with keeping(tmp_path / "memory"), Snapshotter(None, tmp_path / "memory") as snapshots:
        send = snapshots._keeper.client.send

        def send_and_be_answered(*messages: Message) -> bool:
            sent = send(*messages)
            if messages[0]["kind"] == "failed":
                assert (snapshot := snapshots._keeper.current) is not None and snapshot.settled.wait(WAIT_S)
            return sent

        if keeper_is_quick:
            monkeypatch.setattr(snapshots._keeper.client, "send", send_and_be_answered)
        for step in (1, 2, 3):
            with monkeypatch.context() as patch:
                if step == 2:
                    patch.setattr(copying, "copy_part", fail)
                snapshots.snapshot(step, rows_of(0, 1, step))
                outcome = snapshots.settle()
            assert outcome is not None and outcome.why == ("RuntimeError: a bad page" if step == 2 else "")
            assert_equal(loaded(tmp_path / "memory")[0], rows_of(0, 1, 1 if step == 2 else step))


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason=ALLOWED_SKIP)
@pytest.mark.parametrize("check", ["holds_what_was_computed", "does_not_wait_for_training", "sees_a_fused_optimizer"])
def test_a_snapshot_of_a_gpu(check: str) -> None:
    script = f"from {__name__} import {check}; {check}()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(EVERSHARD_TEST_GPU="0"), check=True)


def gpu_pieces(value: float) -> list[Piece]:
    """By rows, by columns (strided), in halves, small, a scalar, and one that is taken at once."""
    torch.manual_seed(int(value))
    wide = torch.randn(4096, 2048, device="cuda")
    return [
        Piece("rows", wide.clone(), (0, 0), (4096, 2048)),
        Piece("left", wide[:, :700], (0, 0), (4096, 2048)),
        Piece("left", wide[:, 700:], (0, 700), (4096, 2048)),
        Piece("half", wide.to(torch.bfloat16), (0, 0), (4096, 2048)),
        Piece("small", wide[0, :5].clone(), (0,), (5,)),
        Piece("count", torch.tensor(value, device="cuda"), (), ()),
        Piece("buffer", wide[1, :9].clone(), (0,), (9,), volatile=True),
    ]


def take(memory: Path, later: bool) -> tuple[list[Piece], list[Piece]]:
    """A snapshot of what a GPU has still to compute, scribbled over when the fence opens; what it holds, and should."""
    with Snapshotter(None, memory) as snapshots:
        for value in (1, 2):  # the second time nothing is allocated
            pieces = gpu_pieces(value)
            expected = [piece.tensor.clone() for piece in pieces]
            for piece in pieces:
                piece.tensor.zero_()
            torch.cuda.synchronize()
            if later:
                torch.cuda._sleep(400_000_000)
            for piece, tensor in zip(pieces, expected, strict=True):
                piece.tensor.copy_(tensor)
            snapshots.snapshot(value, pieces)
            with snapshots.mutating():
                for piece in pieces:
                    piece.tensor.fill_(-3)
            assert (outcome := snapshots.settle()) is not None and outcome.generation, outcome
        assert all(shard.tensor.is_pinned() for shard in snapshots._shards._mapped.values())
        found = gpu_pieces(5)
        load(MappedStorage(memory), found)
        return found, [Piece(p.name, t, p.offset, p.global_shape) for p, t in zip(pieces, expected, strict=True)]


def holds_what_was_computed() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top, keeping(Path(top) / "memory"):
        assert_equal(*take(Path(top) / "memory", later=True))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top, keeping(Path(top) / "memory"):
        waited = torch.cuda.Stream.wait_event
        torch.cuda.Stream.wait_event = lambda *_: None  # type: ignore[method-assign]  # the control
        try:
            found, expected = take(Path(top) / "memory", later=True)
        finally:
            torch.cuda.Stream.wait_event = waited  # type: ignore[method-assign]
        assert not torch.equal(found[0].tensor, expected[0].tensor), "the control finds what was not computed yet"


def does_not_wait_for_training() -> None:
    """It is copied while the GPU is busy with the next step."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top, keeping(Path(top) / "memory"):
        snapshots = Snapshotter(None, Path(top) / "memory")
        pieces, busy = gpu_pieces(1), torch.cuda.Event()
        snapshots.snapshot(1, pieces)
        snapshots.settle()
        torch.cuda.synchronize()
        snapshots.snapshot(2, pieces)
        torch.cuda._sleep(20_000_000_000)  # some seconds
        busy.record()
        snapshots.fence()
        assert not busy.query(), "the copy ended with the step it should have run beside"
        assert (outcome := snapshots.settle()) is not None and outcome.generation
        snapshots.close()


def sees_a_fused_optimizer() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top, keeping(Path(top) / "memory"):
        from checkpointing import DamagedError, describe

        model = torch.nn.Linear(400, 300).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        snapshots = Snapshotter(None, Path(top) / "memory", check_fence=True)
        for step in (1, 2):
            model(torch.ones(1, 400, device="cuda")).sum().backward()
            optimizer.step()
            snapshots.snapshot(step, describe(model, optimizer))
            if step == 1:
                snapshots.fence()
            else:
                assert snapshots._keeper.current is not None and snapshots._keeper.current.copied.wait(WAIT_S)
                optimizer.step()
                with pytest.raises(DamagedError, match="outside"):
                    snapshots.fence()
        snapshots.close()
