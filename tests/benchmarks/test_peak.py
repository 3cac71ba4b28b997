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
