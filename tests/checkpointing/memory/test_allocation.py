"""Arenas are allocated by all ranks of a node together, or by none."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from checkpointing.collective import Team
from checkpointing.errors import CheckpointError, LayoutError
from checkpointing.memory import allocation as module
from checkpointing.memory.allocation import Arenas, Node
from checkpointing.memory.arena import Shards
from checkpointing.plan import layout_rows
from checkpointing.planner import agree_on_plan
from tests.checkpointing.memory.test_snapshotter import rows_of
from tests.harness.threads import all_of, on_ranks


def test_ranks_that_share_a_directory_are_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(team: Team) -> Node:
        return Node.of(team, Path("/a" if team.rank in (0, 2) else "/b"))

    nodes = all_of(on_ranks(4, of))
    assert [(node.ranks, node.number, node.count) for node in nodes] == [([0, 2], 0, 2), ([1, 3], 1, 2)] * 2


def lay_out(team: Team, root: Path, count: int = 2) -> int:
    node = Node.of(team, root)
    pieces = rows_of(team.rank, team.size, 1)
    plan = agree_on_plan(team, layout_rows(pieces))
    arenas = Arenas(team, node, root, count)
    try:
        return arenas.lay_out(plan, pieces).nbytes
    finally:
        arenas.shards.close()


def test_every_arena_has_a_file_of_every_rank(tmp_path: Path) -> None:
    sizes = all_of(on_ranks(2, lambda team: lay_out(team, tmp_path)))
    files = {path.relative_to(tmp_path).as_posix(): path.stat().st_size for path in tmp_path.rglob("shard-*")}
    assert files == {f"arena-{a}/shard-{r:05d}.safetensors": sizes[r] for a in (0, 1) for r in (0, 1)}
    assert all_of(on_ranks(2, lambda team: lay_out(team, tmp_path))) == sizes  # again, over what is there


def test_what_does_not_fit_is_refused_by_all_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(directory: Path, needed: int, arithmetic: str, **_: object) -> None:
        raise LayoutError(f"{arithmetic} is too much")

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_room", no_room)
        failures = on_ranks(2, lambda team: lay_out(team, tmp_path))
    assert all("2 snapshots of" in str(f) and "by 2 processes" in str(f) for f in failures), failures
    assert not list(tmp_path.rglob("shard-*"))

    of = Shards.of

    def full(shards: Shards, arena: str, nbytes: int) -> object:
        if shards._rank == 1:
            raise OSError(errno.ENOSPC, "no space left")
        return of(shards, arena, nbytes)

    monkeypatch.setattr(Shards, "of", full)
    failures = on_ranks(2, lambda team: lay_out(team, tmp_path))
    assert all(isinstance(f, CheckpointError) and "do not fit" in str(f) for f in failures), failures
