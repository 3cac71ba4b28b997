"""What goes into a run's checkpoints, in which order, and what happens when one cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import Piece, load
from checkpointing.errors import LeaseHeldError
from checkpointing.generations import scan
from checkpointing.memory import Snapshotter
from checkpointing.memory.flush import DirectStorage
from checkpointing.storage import FileStorage
from tests.checkpointing.memory.keepers import WAIT_S, keeping
from trainer.compose import compose
from trainer.errors import TrainingFailed
from trainer.outcome import Outcome
from trainer.progress import LossScale, Progress
from trainer.saver import Saver


class Scene:
    """An engine, a tracker and a lease in one, which write down what is asked of them."""

    def __init__(self, directory: Path) -> None:
        self.told: list[str] = []
        self.directory = directory
        self.world_size = 3
        self.taken_over = False

    def pieces(self) -> list[Piece]:
        self.told.append("pieces")
        return [Piece("model/w", torch.arange(6.0), (0,), (6,))]

    def sync(self) -> None:
        self.told.append("sync")

    def check(self, *, anew: bool = False) -> None:
        if self.taken_over:
            raise LeaseHeldError("another process took it over")

    def emit(self, event: str, **facts: Any) -> None:
        self.told.append(f"{event} {facts['step']} {facts.get('tier', 'memory')}" + " skipped" * ("skipped" in facts))
        if event == "commit" and "skipped" not in facts:
            assert facts["generation"] in [g.name for g in scan(FileStorage(self.directory)) if g.committed]

    def saver(self, *overrides: str, lease: bool = True, snapshots: Snapshotter | None = None) -> Saver:
        config = compose([f"checkpoint.dir={self.directory}", *overrides])
        held = self if lease else None
        return Saver(config, self, self, "r1", 4, "data", "model", held, snapshots)  # type: ignore[arg-type]


@contextmanager
def snapshotting(tmp_path: Path, every: int) -> Iterator[tuple[Scene, Saver, Snapshotter]]:
    scene = Scene(tmp_path / "durable")
    with keeping(tmp_path / "memory"):
        snapshots = Snapshotter(scene.directory, tmp_path / "memory", run_id="r1", incarnation=4)
        yield scene, scene.saver(f"checkpoint.memory.every={every}", snapshots=snapshots), snapshots
        snapshots.close()


def save(saver: Saver, done: Progress, metrics: dict[str, float] | None = None) -> None:
    saver.save(done, metrics or {}, durable=True, last=False)


def test_metrics_are_durable_before_the_checkpoint_and_the_event_comes_after_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    saver = scene.saver()
    saver.save(Progress(6), {}, durable=False, last=False)
    assert scene.told == [] and saver.settle() == {"blocked_s": 0}
    save(saver, Progress(7, 700, LossScale(8.0, 3)), {"eval_loss": 1.5})
    assert saver.settle()["blocked_s"] > 0 and saver.settle() == {"blocked_s": 0}
    assert scene.told == ["sync", "pieces", "commit 7 durable"]
    target = Piece("model/w", torch.zeros(6), (0,), (6,))
    state: Any = load(tmp_path, [target])["trainer"]
    assert target.tensor.tolist() == [0, 1, 2, 3, 4, 5]
    assert {k: state[k] for k in ("step", "tokens", "run_id", "world_size", "fingerprint", "architecture")} == {
        "step": 7,
        "tokens": 700,
        "run_id": "r1",
        "world_size": 3,
        "fingerprint": "data",
        "architecture": "model",
    }
    assert Progress.of(state, scaled=True) == Progress(7, 700, LossScale(8.0, 3))
    assert state["config"]["checkpoint"]["dir"] == str(tmp_path)
    manifest = scan(FileStorage(tmp_path))[0].manifest
    assert manifest is not None and (manifest.incarnation, manifest.metrics) == (4, {"eval_loss": 1.5})


def test_only_who_holds_the_lease_deletes(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for step in (1, 2, 3):
        save(scene.saver("checkpoint.keep=1", lease=False), Progress(step))
    assert len(scan(FileStorage(tmp_path))) == 3
    save(scene.saver("checkpoint.keep=1"), Progress(4))
    assert [g.step for g in scan(FileStorage(tmp_path))] == [4]


def test_a_run_that_was_replaced_does_not_write(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    save(scene.saver(), Progress(1))
    scene.taken_over, scene.told = True, []
    with pytest.raises(LeaseHeldError, match="another process took it over"):
        save(scene.saver(), Progress(2))
    assert scene.told == [] and [g.step for g in scan(FileStorage(tmp_path))] == [1]


@contextmanager
def full_disk(patch: pytest.MonkeyPatch, times: int = 1000, error: int = errno.ENOSPC) -> Iterator[list[str]]:
    """Of checkpoints: so many puts fail."""
    put, tries = FileStorage.put, list[str]()

    def failing(self: FileStorage, name: str, parts: Any) -> None:
        if name.startswith("step-"):
            tries.append(name)
            if len(tries) <= times:
                raise OSError(error, os.strerror(error))
        put(self, name, parts)

    with patch.context() as inner:
        inner.setattr(FileStorage, "put", failing)
        yield tries


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
def test_training_goes_on_past_a_save_that_fails_and_the_next_one_is_tried(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(tmp_path)
    saver = scene.saver()
    save(saver, Progress(1))
    with full_disk(monkeypatch, error=error):
        save(saver, Progress(2))
        assert saver.settle()["blocked_s"] > 0 and saver.durable_step == 1
    assert [g.step for g in scan(FileStorage(tmp_path)) if g.committed] == [1]
    assert scene.told[-1] == "commit 2 durable skipped"
    assert f"step 2 did not become durable: {os.strerror(error)}. Training goes on" in caplog.text
    save(saver, Progress(3))  # there is room again
    assert [g.step for g in scan(FileStorage(tmp_path)) if g.committed] == [3, 1] and saver.durable_step == 3


def test_it_ends_after_as_many_in_a_row_as_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Scene(tmp_path).saver("checkpoint.fail_after=3")
    with full_disk(monkeypatch, times=2):
        for step in (1, 2, 3):
            save(saver, Progress(step))
    assert saver.durable_step == 3
    with full_disk(monkeypatch):
        save(saver, Progress(4))
        save(saver, Progress(5))
        with pytest.raises(TrainingFailed, match=r"Step 6 could not .* 3 times in a row .* the same command") as raised:
            save(saver, Progress(6))
    assert not Outcome.of(raised.value).final  # a disk may have more room next time


def test_the_last_step_is_tried_again_and_then_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.saver.LAST_WAITS_S", (0.0, 0.0))
    saver = Scene(tmp_path).saver()
    with full_disk(monkeypatch, times=2):
        saver.save(Progress(1), {}, durable=True, last=True)
    assert saver.durable_step == 1
    with (
        full_disk(monkeypatch) as tries,
        pytest.raises(TrainingFailed, match=r"Step 2 could not be saved: .*No space left.* the same command goes on"),
    ):
        saver.save(Progress(2), {}, durable=True, last=True)
    assert len(tries) == 3 and [g.step for g in scan(FileStorage(tmp_path)) if g.committed] == [1]


def test_what_would_fail_again_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path)
    saver = scene.saver()
    monkeypatch.setattr(scene, "pieces", lambda: [Piece("model/w", torch.arange(6.0), (0,), (7,))])
    with pytest.raises(TrainingFailed, match=r"Step 1 could not be saved: .*model/w"):
        save(saver, Progress(1))


def test_a_step_whose_metrics_are_not_durable_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume from it would find a gap."""
    scene = Scene(tmp_path)
    saver = scene.saver()

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(scene, "sync", full)
        save(saver, Progress(1))
    assert scan(FileStorage(tmp_path)) == [] and scene.told == ["commit 1 durable skipped"]
    save(saver, Progress(2))
    assert [g.step for g in scan(FileStorage(tmp_path))] == [2]


def test_a_snapshot_that_could_not_become_durable_is_owed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with snapshotting(tmp_path, every=1) as (scene, saver, snapshots):

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(scene, "sync", full)
            save(saver, Progress(1))
        saver.settle()
        saver.save(Progress(2), {}, durable=False, last=False)
        assert snapshots.wait_durable(WAIT_S)
        saver.settle()
        assert "commit 1 durable skipped" in scene.told and "commit 2 durable" in scene.told


def test_a_bug_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path)
    monkeypatch.setattr(scene, "pieces", lambda: None)
    with pytest.raises(TypeError):
        save(scene.saver(), Progress(1))


def test_with_snapshots_every_step_is_in_memory_and_some_become_durable(tmp_path: Path) -> None:
    with snapshotting(tmp_path, every=2) as (scene, saver, snapshots):
        for step in range(1, 6):
            saver.save(Progress(step), {}, durable=step == 3, last=False)
            assert snapshots.wait_durable(WAIT_S)
            told = saver.settle()
            assert ("snapshot_age_s" in told) == (step > 1) and told["blocked_s"] >= 0
        assert [line for line in scene.told if line != "pieces"] == [
            "snapshot 2 memory",
            "sync",
            "snapshot 3 memory",
            "commit 3 durable",
            "snapshot 4 memory",
        ]
        assert [g.step for g in scan(FileStorage(tmp_path / "memory"))] == [4, 3, 2]
        saver.finish(Progress(4), {})  # in memory alone: it is saved while the run waits
        assert [g.step for g in scan(FileStorage(scene.directory))] == [4, 3]
        saver.durable_step = 4
        scene.told = []
        saver.finish(Progress(4), {})
        assert scene.told == []


def test_where_a_snapshot_that_was_to_become_durable_was_left_out_the_next_one_is(tmp_path: Path) -> None:
    with snapshotting(tmp_path, every=1) as (scene, saver, snapshots):
        for step in range(1, 6):
            saver.save(Progress(step), {}, durable=step == 2, last=False)
            if step in (2, 3):
                assert snapshots._keeper.current is not None
                snapshots._keeper.current.fail("a test")
                snapshots._keeper.client.send(
                    {"kind": "failed", "serial": snapshots._keeper.current.serial, "why": "a test"}
                )
            if step not in (2, 3):
                assert snapshots.wait_durable(WAIT_S)
            saver.settle()
        assert snapshots.wait_durable(WAIT_S)
        saver.settle()
        assert [line for line in scene.told if line.startswith("commit")] == [
            "commit 2 durable skipped",
            "commit 3 durable skipped",
            "commit 4 durable",
        ]
        assert [g.step for g in scan(FileStorage(scene.directory))] == [4]


def test_a_disk_that_is_full_does_not_stop_training_but_for_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: DirectStorage, name: str, parts: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DirectStorage, "put", full)
    with snapshotting(tmp_path, every=1) as (scene, saver, snapshots):
        for step in (1, 2):
            saver.save(Progress(step), {}, durable=True, last=step == 2)
            assert snapshots.wait_durable(WAIT_S)
            if step == 1:
                saver.settle()
        assert scene.told[-2:] == ["sync", "pieces"] and "commit 1 durable skipped" in scene.told
        saver.finish(Progress(2), {})
        assert scene.told[-1] == "commit 2 durable"
        assert [g.step for g in scan(FileStorage(scene.directory)) if g.committed] == [2]
        snapshots.close()
