"""Constant work on any number of ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.elastic.batch import deal


@given(st.integers(1, 40), st.integers(1, 12))
def test_every_micro_batch_is_dealt_once_and_rounds_are_equal(num: int, ranks: int) -> None:
    dealt = [deal(num, ranks, rank) for rank in range(ranks)]
    assert sorted(i for mine in dealt for i in mine if i is not None) == list(range(num))
    assert {len(mine) for mine in dealt} == {-(-num // ranks)}
    # Only the last round has idle turns, so that no rank waits twice.
    assert all(i is not None for mine in dealt for i in mine[:-1])
