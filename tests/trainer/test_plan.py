"""The plan: degrees, batches and memory, and what is refused with the override to type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.compose import compose
from trainer.errors import Refused
from trainer.options.parallel import Parallel
from trainer.plan import Topology, plan_batch, resolve_topology

CONFIG = compose([])


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (None, 1, 4, (4, 1)),
        (None, 2, 4, (2, 2)),
        (None, 4, 4, (1, 4)),
        (None, -1, 4, (1, 4)),
        (-1, 1, 3, (3, 1)),
        (1, -1, 3, (1, 3)),
        (2, -1, 6, (2, 3)),
        (2, 3, 6, (2, 3)),
        (None, 1, 1, (1, 1)),
        (None, -1, 1, (1, 1)),
    ],
)
def test_degrees_fill_the_world(replicate: int | None, shard: int, world: int, expected: tuple[int, int]) -> None:
    topology = resolve_topology(Parallel(dp_replicate=replicate, dp_shard=shard), world)
    assert (topology.dp_replicate, topology.dp_shard) == expected and topology.data_size == world


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "message"),
    [
        (None, 3, 4, r"Type parallel\.dp_replicate=2 parallel\.dp_shard=2, or start a multiple of 3 processes"),
        (2, 2, 3, r"Type parallel\.dp_replicate=3 parallel\.dp_shard=1, or start 4 processes"),
        (1, 2, 4, r"does not make up the 4 process\(es\)"),
        (-1, -1, 4, "Only one degree can fill the world"),
        (0, 1, 1, r"parallel\.dp_replicate=0 must be at least 1"),
        (1, -2, 1, r"parallel\.dp_shard=-2 must be at least 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(replicate: int | None, shard: int, world: int, message: str) -> None:
    with pytest.raises(Refused, match=message):
        resolve_topology(Parallel(dp_replicate=replicate, dp_shard=shard), world)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 9))
def test_batches_are_refused_only_when_not_a_multiple(total: int, micro: int, size: int) -> None:
    config = CONFIG
    config.train.global_batch, config.train.micro_batch = total, micro
    try:
        plan = plan_batch(config, size)
    except Refused as refused:
        assert total % micro
        for part in str(refused).split("Type ")[1].rstrip(".").replace(", or ", " or ").split(" or "):
            key, _, value = part.partition("=")
            setattr(config.train, key.removeprefix("train."), int(value))
            plan_batch(config, size)  # what it says to type works
            config.train.global_batch, config.train.micro_batch = total, micro
        return
    assert total % micro == 0
    assert plan.num_micro_batches * micro == total
    assert plan.rounds * size == plan.num_micro_batches + plan.idle and 0 <= plan.idle < size


def test_local_batch_must_fit() -> None:
    for bad in (0, 3):
        with pytest.raises(Refused, match=rf"parallel\.local_batch={bad} must lie between"):
            plan_batch(compose([f"parallel.local_batch={bad}"]), 1)


@pytest.mark.parametrize(
    ("given_", "world", "expected"),
    [
        ({"tp": -1, "dp_replicate": 1}, 3, Topology(tp=3)),
        ({"tp": 2}, 4, Topology(dp_replicate=2, tp=2)),
        ({"tp": 2, "pp": 2, "dp_shard": -1}, 8, Topology(dp_shard=2, tp=2, pp=2)),
        ({"pp": -1, "dp_shard": 2, "dp_replicate": 1}, 6, Topology(dp_shard=2, pp=3)),
    ],
)
def test_layers_can_be_split_and_dealt(given_: dict[str, int], world: int, expected: Topology) -> None:
    assert resolve_topology(Parallel(**given_), world) == expected


@pytest.mark.parametrize(
    ("given_", "world", "message"),
    [
        ({"tp": 3}, 4, r"Type parallel\.dp_replicate=2 parallel\.dp_shard=1 parallel\.tp=2, or start a multiple of 3"),
        ({"tp": -1, "pp": -1}, 4, "Only one degree can fill the world"),
        ({"pp": 0}, 1, r"parallel\.pp=0 must be at least 1"),
        ({"cp": 2}, 2, r"context parallelism is not supported\. Type parallel\.cp=1 and parallel\.tp=2"),
        ({"ep": 4}, 4, r"expert parallelism is not supported\. Type parallel\.ep=1 and parallel\.tp=4"),
    ],
)
def test_degrees_of_layers_that_do_not_fit_are_refused(given_: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(Refused, match=message):
        resolve_topology(Parallel(**given_), world)
