"""Several nodes, as directories of one machine with a keeper each: they keep and flush the same generations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from checkpointing import load
from checkpointing.format import ABANDONED
from checkpointing.generations import candidates, scan
from checkpointing.memory import Durable, SnapshotOutcome, Snapshotter
from checkpointing.memory.flush import DirectStorage
from checkpointing.memory.mapped import MappedStorage
from checkpointing.storage import FileStorage
from tests.checkpointing.memory.keepers import WAIT_S, keeping
from tests.checkpointing.memory.test_snapshotter import assert_equal, rows_of
from tests.harness.processes import wait_for
from tests.harness.threads import ThreadTeam, all_of, on_ranks
from trainer.resume import Start, turn_away_from


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Path]]:
    with ExitStack() as opened:
        roots = [tmp_path / f"node-{number}" for number in range(2)]
        for root in roots:
            opened.enter_context(keeping(root))
        yield roots


class Slow:
    """A disk that takes the parts of one node only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
        self.go_on, put = threading.Event(), DirectStorage.put

        def slow(storage: DirectStorage, name: str, chunks: Any) -> None:
            while file in name and not self.go_on.wait(0.01):
                storage._check()
            put(storage, name, chunks)

        monkeypatch.setattr(DirectStorage, "put", slow)


def test_both_flush_the_same_ones_however_slow_one_is(
    tmp_path: Path, nodes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, "shard-00001")
    found: dict[int, list[Durable]] = {}

    def train(team: ThreadTeam) -> None:
        snapshots = Snapshotter(tmp_path / "disk", nodes[team.rank], team, run_id="r")
        for step in range(1, 9):
            snapshots.snapshot(step, rows_of(team.rank, 2, step), durable=True, last=step == 8)
            assert (outcome := snapshots.settle()) is not None and outcome.generation
            if step == 5:
                slow.go_on.set()
                assert snapshots.wait_durable(WAIT_S)
        assert snapshots.wait_durable(WAIT_S)
        found[team.rank] = snapshots.durables()
        snapshots.close()

    all_of(on_ranks(2, train))
    written = [[one.step for one in found[rank] if one.generation] for rank in (0, 1)]
    assert written[0] == written[1] == sorted(g.step for g in candidates(FileStorage(tmp_path / "disk")))
    assert written[0][0] == 1 and written[0][-1] == 8 and {2, 3, 4, 5}.isdisjoint(written[0])
    assert sorted(one.step for one in found[0]) == sorted(one.step for one in found[1]) == list(range(1, 9))
    pieces = rows_of(0, 1, -1)
    load(tmp_path / "disk", pieces)
    assert_equal(pieces, rows_of(0, 1, 8))


def test_a_node_that_lost_its_keeper_holds_up_no_other(
    tmp_path: Path, nodes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was to flush cannot become durable: the other nodes give it up, and flush the next one together."""
    slow = Slow(monkeypatch, "shard-00001")
    found: dict[int, list[Durable]] = {}
    outcomes: dict[int, list[SnapshotOutcome | None]] = {0: [], 1: []}

    def train(team: ThreadTeam) -> None:
        snapshots = Snapshotter(tmp_path / "disk", nodes[team.rank], team, run_id="r")
        for step in range(1, 7):
            snapshots.snapshot(step, rows_of(team.rank, 2, step), durable=step in (1, 6))
            outcomes[team.rank].append(snapshots.settle())
            if step == 1 and team.rank == 1:
                snapshots._keeper.client.hang_up()  # as when it dies: this node knows nothing of its flush any more
                wait_for(snapshots._keeper.client.connected.is_set)
            if step == 4:
                assert snapshots.wait_durable(WAIT_S)
                slow.go_on.set()
        assert snapshots.wait_durable(WAIT_S)
        found[team.rank] = snapshots.durables()
        snapshots.close()

    all_of(on_ranks(2, train))
    assert [bool(one and one.generation) for one in outcomes[0]] == [
        bool(one and one.generation) for one in outcomes[1]
    ]
    assert [(one.step, bool(one.generation)) for one in found[0]] == [(1, False), (6, True)]
    assert [g.step for g in candidates(FileStorage(tmp_path / "disk"))] == [6]


def test_a_generation_that_one_node_lacks_does_not_count(tmp_path: Path, nodes: list[Path]) -> None:
    """And the last one that both have stays until there is a newer one of that kind."""

    def train(team: ThreadTeam) -> None:
        snapshots = Snapshotter(None, nodes[team.rank], team, run_id="r")
        for step in range(1, 7):
            snapshots.snapshot(step, rows_of(team.rank, 2, step))
            if step in (3, 4, 5, 6) and team.rank == 1:
                assert snapshots._keeper.current is not None
                snapshots._keeper.current.fail("a test")
            assert (outcome := snapshots.settle()) is not None and bool(outcome.generation) == (step < 3)
        snapshots.close()
        pieces = rows_of(team.rank, 2, -1)[:1]
        for generation in candidates(MappedStorage(nodes[team.rank])):
            if generation.step == 2:
                load(MappedStorage(nodes[team.rank]), pieces, generation=generation.name, only=["matrix"], group=team)
        assert_equal(pieces, rows_of(team.rank, 2, 2)[:1])

    all_of(on_ranks(2, train))


@pytest.mark.parametrize("when", ["before the commit", "after the commit", "elsewhere"])
def test_what_the_run_turns_away_from_is_not_durable_unmarked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A trainer comes back while the keeper still writes what it does not go on from, on this machine or another."""
    root, disk = tmp_path / "memory", FileStorage(tmp_path / "disk")

    def turn_away() -> None:
        turn_away_from([disk] if when == "elsewhere" else [MappedStorage(root), disk], Start(own=True), 0)

    with keeping(root):
        slow = Slow(monkeypatch, "index-00000" if when == "elsewhere" else "shard-00000")
        snapshots = Snapshotter(tmp_path / "disk", root, run_id="r")
        snapshots.snapshot(1, rows_of(0, 1, 1), durable=True)
        assert (outcome := snapshots.settle()) is not None and outcome.generation
        if when == "before the commit":
            turn_away()
        elif when == "elsewhere":
            wait_for(lambda: bool(list(disk.root.glob("step-*"))))
            turn_away()
        else:
            create = DirectStorage.create_if_absent

            def commit(storage: DirectStorage, name: str, data: bytes) -> bool:
                if name.endswith("COMMIT"):
                    turn_away()  # it looks for what is durable right before this one is
                return create(storage, name, data)

            monkeypatch.setattr(DirectStorage, "create_if_absent", commit)
        slow.go_on.set()
        assert snapshots.wait_durable(WAIT_S)
        assert not candidates(disk)
        assert [ABANDONED in g.files for g in scan(disk)] == [True] * (when == "after the commit")
        snapshots.close()
