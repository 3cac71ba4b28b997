"""In no order of three processes does one write after another one has come to hold the directory."""

from __future__ import annotations

import pytest

from tests.harness import lease_model


def test_in_no_order_do_two_write() -> None:
    """`python -m benchmarks.lease` tries a million."""
    worlds = [lease_model.run(seed) for seed in range(1500)]
    assert [world.wrong for world in worlds if world.wrong] == []
    assert sum(world.writes for world in worlds) > 3000 and sum(world.replaced for world in worlds) > 500


@pytest.mark.parametrize("control", lease_model.CONTROLS)
def test_without_a_part_of_the_protocol_two_do(control: str) -> None:
    variant = lease_model.CONTROLS[control]
    assert any(lease_model.run(seed, variant).wrong for seed in range(6000))
