"""The world in which the lease is modelled: what a process sees of it, and what is called wrong."""

from __future__ import annotations

import random

import pytest

from checkpointing.lease_protocol import Create, Delete, Now, Numbers, Put, ReadClaim, WaitFor
from tests.harness.lease_model import Process, World, carry_out, run


@pytest.fixture
def world() -> World:
    return World()


def process(number: int) -> Process:
    return Process(number, steps=iter(()))  # type: ignore[arg-type]


def test_creation_is_exclusive_and_files_are_read_as_they_are(world: World) -> None:
    one, other, rng = process(0), process(1), random.Random(0)
    assert carry_out(world, one, Create("lease-000001.json", b"a"), rng)
    assert not carry_out(world, other, Create("lease-000001.json", b"b"), rng)
    assert carry_out(world, other, ReadClaim("lease-000001.json"), rng) == b"a"
    carry_out(world, one, Put("lease-000001.beat", b"1"), rng)
    assert carry_out(world, other, ReadClaim("lease-000001.beat"), rng) == b"1"
    carry_out(world, one, Delete(["lease-000001.json", "absent"]), rng)
    assert carry_out(world, other, ReadClaim("lease-000001.json"), rng) is None


def test_a_listing_may_be_stale_but_not_older_than_what_one_has_written_or_seen(world: World) -> None:
    one, other = process(0), process(1)
    for number in range(1, 6):
        carry_out(world, one, Create(f"lease-{number:06d}.json", b""), random.Random(0))
    seen = {carry_out(world, process(2), Numbers(), random.Random(seed)) for seed in range(50)}
    assert () in seen and (1, 2, 3, 4, 5) in seen and len(seen) == 6
    carry_out(world, other, Put("lease-000005.beat", b"1"), random.Random(0))
    assert {carry_out(world, other, Numbers(), random.Random(seed)) for seed in range(50)} == {(1, 2, 3, 4, 5)}


def test_waiting_lasts(world: World) -> None:
    one = process(0)
    world.now = 3.0
    assert carry_out(world, one, Now(), random.Random(0)) == 3.0
    carry_out(world, one, WaitFor(4.0, None), random.Random(0))
    assert one.until == 7.0


def test_only_a_write_under_an_overtaken_claim_is_wrong(world: World) -> None:
    world.held = {0: 3, 1: 2}
    world.write(0, 3)
    assert not world.wrong
    world.write(1, 2)
    assert "process 1 writes under claim 2" in world.wrong


def test_an_order_is_a_function_of_its_seed() -> None:
    assert run(5) == run(5) and run(5) != run(6)
