"""Snapshots: what they hold, what the fence guards, what happens when room, keeper or disk are not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import DamagedError, LayoutError, Piece, describe, load
from checkpointing.generations import candidates, scan
from checkpointing.lease import Hold, Holder, Lease
from checkpointing.lease_protocol import RELEASED, claim_name
from checkpointing.memory import Snapshotter, copying
from checkpointing.memory.flush import DirectStorage
from checkpointing.memory.image import copy_part
from checkpointing.memory.keeper import Keeper
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import Message
from checkpointing.storage import FileStorage
from tests.checkpointing.memory.keepers import WAIT_S, keeping
from tests.harness.processes import wait_for
from tests.harness.threads import ThreadTeam, all_of, on_ranks


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with keeping(tmp_path / "memory"):
        yield tmp_path / "memory"


def rows_of(rank: int, size: int, value: float, rows: int = 13, columns: int = 700) -> list[Piece]:
    """This rank's share of a matrix by rows, and a replicated vector."""
    first, last = rank * rows // size, (rank + 1) * rows // size
    whole = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) + value
    return [
        Piece("matrix", whole[first:last].clone(), (first, 0), (rows, columns)),
        Piece("vector", torch.full((5,), value), (0,), (5,)),
        Piece("count", torch.tensor(value), (), ()),
    ]


def loaded(directory: Path, rank: int = 0, size: int = 1, team: Any = None) -> tuple[list[Piece], dict[str, Any]]:
    pieces = rows_of(rank, size, -1)
    return pieces, load(MappedStorage(directory), pieces, group=team)


def assert_equal(found: list[Piece], expected: list[Piece]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.tensor, b.tensor), a.name


def test_every_snapshot_holds_the_state_of_its_step(memory: Path) -> None:
    with Snapshotter(None, memory) as snapshots:
        for step in range(1, 8):
            snapshots.snapshot(step, rows_of(0, 1, step), {"step": step})
            outcome = snapshots.settle()
            assert outcome is not None and outcome.step == step and outcome.generation, outcome
            found, objects = loaded(memory)
            assert_equal(found, rows_of(0, 1, step))
            assert objects == {"step": step}
            assert len(candidates(MappedStorage(memory))) == min(step, 3)


def test_many_ranks_save_and_fewer_load(memory: Path) -> None:
    def take(team: ThreadTeam) -> None:
        snapshots = Snapshotter(None, memory, team)
        for step in (1, 2):
            snapshots.snapshot(step, rows_of(team.rank, 3, step), {"step": step})
            assert (outcome := snapshots.settle()) is not None and outcome.generation
        snapshots.close()

    all_of(on_ranks(3, take))
    for size in (1, 2, 4):
        found = all_of(on_ranks(size, lambda team: loaded(memory, team.rank, team.size, team)))
        for rank, (pieces, objects) in enumerate(found):
            assert_equal(pieces, rows_of(rank, size, 2))
            assert objects == {"step": 2}


class Gate:
    """Holds copying up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        monkeypatch.setattr(copying, "copy_part", self._copy)

    def _copy(self, *arguments: Any) -> None:
        self.reached.set()
        assert self.open.wait(WAIT_S)
        copy_part(*arguments)


@pytest.mark.parametrize("fenced", [True, False], ids=["fenced", "control: without the fence"])
def test_what_is_written_after_the_fence_is_not_in_the_snapshot(
    memory: Path, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    """A canary scribbles on every tensor as soon as the fence opens."""
    gate = Gate(monkeypatch)
    pieces = rows_of(0, 1, 5)
    with Snapshotter(None, memory) as snapshots:
        if not fenced:
            monkeypatch.setattr(snapshots, "fence", lambda: None)
        snapshots.snapshot(1, pieces)
        opener = threading.Timer(0.2, gate.open.set)
        opener.start()
        with snapshots.mutating():
            assert gate.open.is_set() == fenced
            for piece in pieces:
                piece.tensor.fill_(-7)
        opener.join()
        monkeypatch.undo()
        assert (outcome := snapshots.settle()) is not None and outcome.generation
        found, _ = loaded(memory)
        if fenced:
            assert_equal(found, rows_of(0, 1, 5))
        else:
            with pytest.raises(AssertionError):
                assert_equal(found, rows_of(0, 1, 5))


@pytest.mark.parametrize("write", ["in place", "through .data", "a fused optimizer", "while it is copied", "nothing"])
def test_writes_outside_the_fence_are_found(memory: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    """And what they spoilt is not committed."""
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    gate = Gate(monkeypatch)
    if write == "while it is copied":  # right after a part was, and before the whole is

        def copy_and_write(part: Any, piece: Piece, target: memoryview) -> None:
            gate._copy(part, piece, target)
            piece.tensor.data.add_(1)

        monkeypatch.setattr(copying, "copy_part", copy_and_write)
    snapshots = Snapshotter(None, memory, check_fence=True)
    snapshots.snapshot(1, describe(model, optimizer))
    assert gate.reached.wait(WAIT_S)
    gate.open.set()
    assert snapshots._keeper.current is not None and snapshots._keeper.current.copied.wait(WAIT_S)
    with torch.no_grad():
        if write == "in place":
            model.weight[0, 0] += 1
        elif write == "through .data":
            model.bias.data.mul_(2)
        elif write == "a fused optimizer":
            optimizer.step()
    if write == "nothing":
        snapshots.fence()
    else:
        with pytest.raises(DamagedError, match="something changes parameters or optimizer state outside"):
            snapshots.fence()
    outcome = snapshots.settle()
    assert outcome is not None and bool(outcome.generation) == (write == "nothing")
    assert bool(candidates(MappedStorage(memory))) == (write == "nothing")
    snapshots.close()


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "control: not guarded"])
def test_a_guarded_optimizer_waits_by_itself(memory: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool) -> None:
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 40)).sum().backward()
    before = model.weight.detach().clone()
    gate = Gate(monkeypatch)
    snapshots = Snapshotter(None, memory)
    if guarded:
        snapshots.guard(optimizer)
    snapshots.snapshot(1, describe(model, optimizer))
    opener = threading.Timer(0.2, gate.open.set)
    opener.start()
    optimizer.step()
    assert gate.open.is_set() == guarded
    opener.join()
    assert (outcome := snapshots.settle()) is not None and outcome.generation
    load(MappedStorage(memory), describe(model, optimizer))
    assert torch.equal(model.weight, before) == guarded
    snapshots.close()


def test_an_optimizer_in_the_backward_is_waited_for_at_once(memory: Path) -> None:
    pieces = rows_of(0, 1, 3)
    snapshots = Snapshotter(None, memory)
    snapshots.snapshot(1, pieces, wait=True)
    for piece in pieces:
        piece.tensor.fill_(0)
    assert (outcome := snapshots.settle()) is not None and outcome.generation
    found, _ = loaded(memory)
    assert_equal(found, rows_of(0, 1, 3))
    snapshots.close()


def test_volatile_tensors_are_taken_at_once(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    running = Piece("running", torch.full((3,), 1.0), (0,), (3,), volatile=True)
    stable = Piece("stable", torch.full((3,), 1.0), (0,), (3,))
    snapshots = Snapshotter(None, memory)
    snapshots.snapshot(1, [running, stable])
    running.tensor.fill_(2)  # a forward
    gate.open.set()
    assert (outcome := snapshots.settle()) is not None and outcome.generation
    found = [Piece(name, torch.zeros(3), (0,), (3,)) for name in ("running", "stable")]
    load(MappedStorage(memory), found)
    assert [piece.tensor.tolist() for piece in found] == [[1] * 3] * 2
    snapshots.close()


def test_another_layout_is_laid_out_anew(memory: Path) -> None:
    with Snapshotter(None, memory) as snapshots:
        for step, rows in enumerate((13, 40, 7, 13), start=1):
            snapshots.snapshot(step, rows_of(0, 1, step, rows))
            assert (outcome := snapshots.settle()) is not None and outcome.generation, outcome
            pieces = rows_of(0, 1, -1, rows)
            load(MappedStorage(memory), pieces)
            assert_equal(pieces, rows_of(0, 1, step, rows))


def test_a_durable_one_is_the_same_on_the_disk(memory: Path, tmp_path: Path) -> None:
    snapshots = Snapshotter(tmp_path / "disk", memory, run_id="r", incarnation=3)
    for step in (1, 2, 3):
        snapshots.snapshot(step, rows_of(0, 1, step), {"step": step}, durable=step == 2, metrics={"loss": 0.5})
        assert snapshots.wait_durable(WAIT_S)
    (durable,) = snapshots.durables()
    assert durable.step == 2 and not durable.why and durable.nbytes > 13 * 700 * 4
    assert {path.read_bytes() for path in (memory / durable.generation).iterdir()} == {
        path.read_bytes() for path in (tmp_path / "disk" / durable.generation).iterdir()
    }
    (generation,) = candidates(DirectStorage(tmp_path / "disk"))
    assert generation.sound and generation.manifest is not None
    assert (generation.manifest.run_id, generation.manifest.incarnation) == ("r", 3)
    assert generation.manifest.metrics == {"loss": 0.5}
    pieces = rows_of(0, 1, -1)
    assert load(tmp_path / "disk", pieces) == {"step": 2}
    assert_equal(pieces, rows_of(0, 1, 2))
    snapshots.close()


def test_a_slow_disk_skips_and_the_last_waits(memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on = threading.Event(), threading.Event()
    put = DirectStorage.put

    def slow(self: DirectStorage, name: str, chunks: Any) -> None:
        writing.set()
        assert go_on.wait(WAIT_S)
        put(self, name, chunks)

    monkeypatch.setattr(DirectStorage, "put", slow)
    snapshots = Snapshotter(tmp_path / "disk", memory)
    for step in range(1, 7):
        snapshots.snapshot(step, rows_of(0, 1, step), durable=True, last=step == 6)
        assert (outcome := snapshots.settle()) is not None and outcome.generation  # memory goes on meanwhile
        assert writing.wait(WAIT_S)
    assert [(d.step, "slower" in d.why) for d in snapshots.durables()] == [(n, True) for n in (2, 3, 4, 5)]
    assert not snapshots.wait_durable(0.01)
    go_on.set()
    assert snapshots.wait_durable(WAIT_S)
    assert [(d.step, d.why) for d in snapshots.durables()] == [(1, ""), (6, "")]
    assert [g.step for g in candidates(DirectStorage(tmp_path / "disk"))] == [6, 1]
    snapshots.close()


def test_a_disk_that_is_done_is_not_taken_for_busy(memory: Path, tmp_path: Path) -> None:
    """Also where it was still writing when the snapshot before was settled."""
    snapshots = Snapshotter(tmp_path / "disk", memory)
    for step in (1, 2, 3):
        snapshots.snapshot(step, rows_of(0, 1, step), durable=True)
        assert (outcome := snapshots.settle()) is not None and outcome.generation
        assert snapshots.wait_durable(WAIT_S)
    assert [(one.step, one.why) for one in snapshots.durables()] == [(1, ""), (2, ""), (3, "")]
    snapshots.close()


def test_a_failed_flush_is_told_and_leaves_nothing(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: DirectStorage, name: str, chunks: Any) -> None:
        raise OSError(28, "No space left on device")

    snapshots = Snapshotter(tmp_path / "disk", memory)
    with monkeypatch.context() as patch:
        patch.setattr(DirectStorage, "put", full)
        snapshots.snapshot(1, rows_of(0, 1, 1), durable=True)
        assert snapshots.wait_durable(WAIT_S)
    assert [(d.step, d.generation, "No space left" in d.why) for d in snapshots.durables()] == [(1, "", True)]
    assert not candidates(DirectStorage(tmp_path / "disk"))
    snapshots.snapshot(2, rows_of(0, 1, 2), durable=True)
    assert snapshots.wait_durable(WAIT_S)
    assert [g.step for g in candidates(DirectStorage(tmp_path / "disk"))] == [2]
    snapshots.close()


def test_without_a_free_arena_the_snapshot_is_left_out_and_said_so(memory: Path) -> None:
    snapshots = Snapshotter(None, memory, arenas=2)
    storage = MappedStorage(memory)
    outcomes = []
    holds = []
    for step in range(1, 6):
        snapshots.snapshot(step, rows_of(0, 1, step))
        outcomes.append(snapshots.settle())
        if step <= 2:
            assert outcomes[-1] is not None
            holds.append(Hold(storage, outcomes[-1].generation, "read"))
        if step == 4:
            for one in holds:
                one.release()
    assert [bool(outcome and outcome.generation) for outcome in outcomes] == [True, True, False, False, True]
    assert outcomes[2] is not None and "every arena is in use" in outcomes[2].why
    found, _ = loaded(memory)
    assert_equal(found, rows_of(0, 1, 5))
    snapshots.close()


def test_durable_needs_a_directory(memory: Path) -> None:
    snapshots = Snapshotter(None, memory)
    with pytest.raises(LayoutError, match="made without a directory"):
        snapshots.snapshot(1, rows_of(0, 1, 1), durable=True)
    snapshots.close()


def test_no_room_is_refused_with_the_arithmetic(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpointing.memory import room

    monkeypatch.setattr(room, "find_room", lambda *_, **__: room.Room(1000, "a test"))
    snapshots = Snapshotter(None, memory)
    with pytest.raises(
        LayoutError, match=r"need 0\.00 GB more in .* \(3 snapshots of .* by 1 processes.* a test leaves"
    ):
        snapshots.prepare(rows_of(0, 1, 1))
    assert not list(memory.glob("arena-*"))
    snapshots.close()


def test_what_another_process_has_taken_over_is_not_flushed(tmp_path: Path) -> None:
    """Also where the run that was replaced has not noticed yet, or is stopped."""
    disk = FileStorage(tmp_path / "disk")
    lease = Lease.acquire(FileStorage(tmp_path / "disk" / ".lease"))
    with (
        keeping(tmp_path / "memory"),
        Snapshotter(disk.root, tmp_path / "memory", lease=lease) as snapshots,
    ):
        for step in (1, 2, 3):
            if step == 2:
                claim = json.dumps(asdict(Holder.this_process())).encode()
                assert lease.storage.create_if_absent(claim_name(lease.number + 1), claim)
            if step == 3:  # nobody is there any more: it was given back
                assert lease.storage.create_if_absent(claim_name(lease.number + 2), RELEASED)
            snapshots.snapshot(step, rows_of(0, 1, step), durable=True)
            assert (outcome := snapshots.settle()) is not None and outcome.generation
            assert snapshots.wait_durable(WAIT_S)
        assert [(one.step, "taken" in one.why) for one in snapshots.durables()] == [(1, False), (2, True), (3, True)]
    assert [g.step for g in scan(disk) if g.committed] == [1]
    lease.release()


def test_a_keeper_that_ends_as_soon_as_it_has_committed_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    """The next one does not know the layout, however late this rank hears that its message was sent."""
    memory, released = tmp_path / "memory", threading.Event()
    with keeping(memory):
        snapshots = Snapshotter(None, memory)
        snapshots._keeper.client._starts = False
        send = snapshots._keeper.client.send

        def send_slowly(*messages: Message) -> bool:
            sent = send(*messages)
            return sent and (messages[-1]["kind"] != "prepared" or released.wait(WAIT_S))

        snapshots._keeper.client.send = send_slowly  # type: ignore[method-assign]
        snapshots.snapshot(1, rows_of(0, 1, 1))
        assert (outcome := snapshots.settle()) is not None and outcome.generation
    wait_for(lambda: not snapshots._keeper.client.connected.is_set())
    wait_for(lambda: not snapshots._keeper.known_layout)
    released.set()
    with keeping(memory):
        wait_for(snapshots._keeper.client.connected.is_set)
        snapshots.snapshot(2, rows_of(0, 1, 2))
        assert (outcome := snapshots.settle()) is not None and outcome.generation, outcome
        snapshots.close()


def test_training_goes_on_without_a_keeper_and_with_the_next_one(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    with keeping(memory):
        snapshots = Snapshotter(None, memory)
        snapshots._keeper.client._starts = False  # this test starts them
        snapshots.snapshot(1, rows_of(0, 1, 1))
        assert (outcome := snapshots.settle()) is not None and outcome.generation
    snapshots.snapshot(2, rows_of(0, 1, 2))
    assert (outcome := snapshots.settle()) is not None and not outcome.generation and "keeper" in outcome.why
    found, _ = loaded(memory)
    assert_equal(found, rows_of(0, 1, 1))
    with keeping(memory):
        wait_for(snapshots._keeper.client.connected.is_set)
        for step in (3, 4, 5, 6):
            snapshots.snapshot(step, rows_of(0, 1, step))
            assert (outcome := snapshots.settle()) is not None and outcome.generation, outcome
        assert [g.step for g in candidates(MappedStorage(memory))] == [6, 5, 4]
        snapshots.close()


def test_when_the_run_finishes_no_memory_is_left(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    with keeping(memory):
        with Snapshotter(None, memory) as snapshots:
            snapshots.snapshot(1, rows_of(0, 1, 1))
        wait_for(lambda: not memory.exists())


def test_when_the_run_does_not_come_back_no_memory_is_left(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    with keeping(memory) as keeper:
        snapshots = Snapshotter(None, memory, keep_s=0.2)
        snapshots.snapshot(1, rows_of(0, 1, 1))
        assert (outcome := snapshots.settle()) is not None and outcome.generation
        assert isinstance(keeper, Keeper) and keeper.keep_s == 0.2
        snapshots.close()
        wait_for(lambda: not memory.exists())
