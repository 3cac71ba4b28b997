"""Counting memory by operations."""

from __future__ import annotations

import torch

from benchmarks.peak import Peak


def test_the_most_that_lives_at_a_time_is_counted() -> None:
    held = torch.zeros(1000)
    with Peak([held, held[1:]]) as peak:  # a view has no memory of its own
        one = torch.zeros(500)
        del one
        two = held[:100] + 1
        assert peak.now == 4 * (1000 + 100)
    assert peak.most == 4 * (1000 + 500)
    assert two.numel() == 100


def test_what_is_shrunk_or_grown_in_place_counts_as_it_is() -> None:
    """FSDP2 gives memory back that way."""
    held = torch.zeros(1000)
    with Peak([held]) as peak:
        held.untyped_storage().resize_(0)
        torch.zeros(500)
        assert peak.most == 4 * 1000
        held.untyped_storage().resize_(4 * 2000)
        torch.zeros(100)
    assert peak.most == 4 * (2000 + 100)
