"""Scores: the approximation of a rank, draws that depend on nothing but their key, sums over slices."""

from __future__ import annotations

import pytest
import torch

from trainer.methods.selection.scores import SCORES, Subject, scores_of, selection_key
from trainer.options.method import Granularity, Selector


def subject(shape: tuple[int, int] = (5, 8), **more: torch.Tensor) -> Subject:
    return Subject(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 7, 2, **more)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4), (6, 6)])
def test_low_rank_is_that_of_the_singular_vectors(shape: tuple[int, int]) -> None:
    given = subject(shape)
    u, s, v = torch.linalg.svd(given.weight.double(), full_matrices=False)
    expected = (u[:, :2] * s[:2]) @ v[:2]
    torch.testing.assert_close(SCORES[Selector.low_rank](given), expected.abs().float(), rtol=1e-5, atol=1e-6)


def test_every_selector_has_a_score_and_what_it_says() -> None:
    given = subject(base=torch.zeros(5, 8), gradient=torch.full((5, 8), -3.0))
    assert set(SCORES) == set(Selector)
    assert torch.equal(SCORES[Selector.magnitude](given), given.weight.abs())
    assert torch.equal(SCORES[Selector.smallest](given), -given.weight.abs())
    assert torch.equal(SCORES[Selector.delta](given), given.weight.abs())
    assert float(SCORES[Selector.gradient](given)[0, 0]) == 3
    assert float(SCORES[Selector.squared_gradient](given)[0, 0]) == -3  # a sum of squares is given as it is


def test_draws_follow_from_seed_name_and_number() -> None:
    keys = {selection_key(seed, name, number) for seed in (0, 1) for name in ("a", "b") for number in (0, 20)}
    assert len(keys) == 8
    state = torch.get_rng_state()
    first, again = (SCORES[Selector.random](subject()) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)


def test_slices_have_the_sum_of_their_entries() -> None:
    given = subject()
    flat = scores_of(Selector.magnitude, given, Granularity.element, 1)
    columns = scores_of(Selector.magnitude, given, Granularity.inputs, 4)
    rows = scores_of(Selector.magnitude, given, Granularity.outputs, 1)
    matrix = flat.view(5, 8).double()
    torch.testing.assert_close(columns, torch.stack([matrix[:, :4].sum(), matrix[:, 4:].sum()]))
    torch.testing.assert_close(rows, matrix.sum(1))
    assert scores_of(Selector.random, given, Granularity.inputs, 4).shape == (2,)
