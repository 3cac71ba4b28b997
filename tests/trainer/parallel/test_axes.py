"""A layout is refused by the axis that a model cannot be taken apart along, before anything is built."""

from __future__ import annotations

import pytest

from tests.harness.engines import MODEL
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods import build
from trainer.parallel.axes import TAKING, is_possible, refuse_layout
from trainer.plan import AXES, TAKING_APART, Topology

CONFIG = compose(MODEL)  # of five layers and six heads, three of keys


@pytest.mark.parametrize(
    ("topology", "why"),
    [
        (Topology(), ""),
        (Topology(tp=2, pp=2, dp_shard=4), ""),
        (Topology(dp_replicate=99), ""),
        (Topology(tp=7), "parallel.tp=7"),
        (Topology(pp=6), "parallel.pp=6"),
        (Topology(tp=2, pp=6), "parallel.pp=6"),
    ],
    ids=str,
)
def test_the_axis_that_does_not_fit_refuses(topology: Topology, why: str) -> None:
    model = build(CONFIG, "meta")
    assert is_possible(model, topology, CONFIG) == (not why)
    if why:
        with pytest.raises(Refused, match=why.replace(".", r"\.")):
            refuse_layout(model, topology, CONFIG)


def test_every_axis_is_a_degree_and_every_degree_has_its_place() -> None:
    assert {axis.name for axis in TAKING} < set(TAKING_APART) < set(AXES)
    assert set(AXES) == set(Topology.__dataclass_fields__)
    assert Topology(2, 3, 5, 7).size == 2 * 3 * 5 * 7
