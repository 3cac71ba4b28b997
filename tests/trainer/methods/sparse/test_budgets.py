"""Allocators: how much of every weight trains."""

from __future__ import annotations

import pytest

from trainer.errors import Refused
from trainer.methods.sparse.budgets import Target, counts_of, dense_hits, densities_by_pattern, together
from trainer.options.method import Allocator, Granularity, Sparse

TARGETS = {"a.q_proj": Target(100, 200), "a.down_proj": Target(50, 30)}
HEADS = {"a.o_proj": Target(64, 64, Granularity.inputs, 16), "a.down_proj": Target(64, 172, Granularity.inputs)}


def test_uniform_and_rank_and_by_module() -> None:
    assert counts_of(Sparse(density=0.01), TARGETS) == {"a.q_proj": 200, "a.down_proj": 15}
    assert counts_of(Sparse(allocator=Allocator.rank, budget_rank=3), TARGETS) == {"a.q_proj": 900, "a.down_proj": 240}
    config = Sparse(allocator=Allocator.by_module, densities=["down:0.1", "proj:0.001"])
    assert counts_of(config, TARGETS) == {"a.q_proj": 20, "a.down_proj": 150}
    assert together(Sparse(density=0.01), TARGETS) == 215


def test_at_least_one_and_at_most_all() -> None:
    assert counts_of(Sparse(density=0.0), TARGETS) == {"a.q_proj": 1, "a.down_proj": 1}
    assert counts_of(Sparse(allocator=Allocator.rank, budget_rank=1e6), TARGETS) == {
        "a.q_proj": 20000,
        "a.down_proj": 1500,
    }
    assert counts_of(Sparse(density=1.0), {"x": Target(1, 1)}) == {"x": 1}


def test_whole_heads_are_the_units_of_a_slice() -> None:
    config = Sparse(allocator=Allocator.by_module, densities=["o_proj:0.3", "down_proj:0.02"])
    assert counts_of(config, HEADS) == {"a.o_proj": 1, "a.down_proj": 3}


def test_weights_with_many_hits_are_promoted() -> None:
    counts = {"a.q_proj": 300, "a.down_proj": 79}
    assert dense_hits(counts, TARGETS, 8, 8) == {"a.q_proj"}  # from 300 and 80 hits on
    assert dense_hits(counts, TARGETS, 0, 8) == set()


@pytest.mark.parametrize("given", ["o_proj", "o_proj:2", ":0.5", "o_proj:x", "(:0.5", "o_proj:0", "o_proj:nan"])
def test_what_is_no_density_is_refused(given: str) -> None:
    with pytest.raises(Refused, match=r"is no pattern:density\. Type one such as"):
        densities_by_pattern(given)


def test_patterns_that_miss_a_layer_or_match_none_are_refused() -> None:
    with pytest.raises(Refused, match=r"no pattern for a\.down_proj\. Add one such as down_proj:0\.01"):
        counts_of(Sparse(allocator=Allocator.by_module, densities=["q_proj:0.1"]), TARGETS)
    with pytest.raises(Refused, match=r"names k_proj:0\.1, which is found in no targeted layer"):
        counts_of(Sparse(allocator=Allocator.by_module, densities=["_proj:0.1", "k_proj:0.1"]), TARGETS)
