"""Calls on many ranks: what each returns, and what a rank that fails, ends or hangs leads to."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness.processes import alive
from tests.harness.worlds import SharedWorld, fresh_world, on_ranks


def summed(value: int) -> tuple[int, int, int]:
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank(), int(total)


def test_every_rank_answers_and_is_used_again(world: SharedWorld) -> None:
    first, again = world.run(summed, 3, 10), world.run(summed, 2, 1)
    assert [rank for _, rank, _ in first] == [0, 1, 2] and {total for *_, total in first} == {33}
    assert {total for *_, total in again} == {3} and [pid for pid, *_ in again] == [pid for pid, *_ in first[:2]]


def fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1 alone")


def test_a_rank_that_fails_is_named_with_its_trace(world: SharedWorld) -> None:
    with pytest.raises(AssertionError, match=r"(?s)^rank 1:\nTraceback.*in fails.*ValueError: of rank 1 alone"):
        world.run(fails, 2)
    assert len(world.run(summed, 2, 1)) == 2


def ends() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)


def hangs() -> int:
    if os.environ["RANK"] == "1":
        time.sleep(600)
    return os.getpid()


@pytest.mark.usefixtures("processes")
def test_a_rank_that_ends_or_hangs_ends_the_call_and_nothing_is_left() -> None:
    world = SharedWorld(forked=True, wait_s=5)
    with pytest.raises(AssertionError, match="rank 1 ended with status 7"):
        world.run(ends, 2, environment=True)
    with pytest.raises(
        AssertionError, match=r"rank 1 did not answer within 5 s; the others said \[\('ok', \d+"
    ) as told:
        world.run(hangs, 2, environment=True)
    pid = int(str(told.value).split("('ok', ")[1].split(",")[0])
    assert not alive(pid) and len(world.run(summed, 2, 1)) == 2
    world.stop()


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_processes_that_are_started_end_with_their_world() -> None:
    with fresh_world() as world:
        pids = [pid for pid, *_ in world.run(summed, 2, 1)]
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    assert [total for *_, total in on_ranks(summed, 2, 5)] == [11, 11]
