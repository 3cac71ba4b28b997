"""Dense gradients a layer at a time, those of candidates, and penalties, against what autograd says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer.methods.sparse.layer import choose, make_sparse
from trainer.methods.sparse.watching import (
    CandidateWatch,
    ChoiceWatch,
    GradientWatch,
    Penalty,
    full_gradient,
    nuclear_gradient,
)
from trainer.options.method import Granularity

G, X = (
    torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),
    torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
)


def layer(indices: tuple[int, ...] = (0, 5, 7)) -> Any:
    made = make_sparse(nn.Linear(3, 4, bias=False), Granularity.element, len(indices))
    choose(made, torch.tensor(indices))
    return made


def test_squares_are_of_the_sums_over_parts_of_a_micro_batch() -> None:
    watch = GradientWatch(layer(), None, squared=True)
    watch(True, G[:2], X[:2])
    watch(False, G[2:4], X[2:4])
    watch.flush()
    watch(False, G[4:], X[4:])
    watch.flush()
    first, second = full_gradient(layer(), G[:4], X[:4], None), full_gradient(layer(), G[4:], X[4:], None)
    assert watch.total is not None
    torch.testing.assert_close(watch.total, first**2 + second**2)


def test_candidates_are_the_largest_of_what_does_not_train_in_the_first_part() -> None:
    made = layer()
    watch = ChoiceWatch(made, None, 4)
    watch(False, G, X)
    assert watch.chosen is None
    watch(True, G, X)
    watch(True, G * 0, X)  # what a pipeline adds without targets
    score = (G.T @ X).abs().reshape(-1)
    score[[0, 5, 7]] = -1
    assert watch.chosen is not None and watch.chosen.tolist() == sorted(score.topk(4).indices.tolist())
    many = ChoiceWatch(made, None, 99)
    many(True, G, X)
    assert many.chosen is not None and many.chosen.numel() == 9


def test_gradients_at_candidates_add_up() -> None:
    watch = CandidateWatch(layer(), torch.tensor([1, 2, 11], dtype=torch.int32))
    watch(True, G[:3], X[:3])
    watch(False, G[3:], X[3:])
    torch.testing.assert_close(watch.total, (G.T @ X).reshape(-1)[[1, 2, 11]])


def test_the_nuclear_norms_gradient_is_autograds_and_zero_at_the_base() -> None:
    made = layer((0, 1, 4, 6, 8, 11))
    values = torch.tensor([0.5, -1.0, 2.0, 0.3, -0.7, 0.9], requires_grad=True)
    whole = torch.zeros(12).index_put((made.sparse_indices.long(),), values).view(4, 3)
    torch.linalg.matrix_norm(whole, "nuc").backward()
    found = nuclear_gradient(made, values.detach(), 2.0)
    torch.testing.assert_close(found, 2 * values.grad, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    assert torch.equal(nuclear_gradient(made, torch.zeros(6), 2.0), torch.zeros(6))


def test_penalties_add_up_and_count_once() -> None:
    made = layer()
    values = torch.tensor([1.0, -2.0, 0.0])
    absolute = Penalty(made, 0.1, 0.0)(values)
    assert absolute.tolist() == pytest.approx([0.1, -0.1, 0.0])
    both = Penalty(made, 0.1, 0.5)(values)
    torch.testing.assert_close(both, absolute + nuclear_gradient(made, values, 0.5))
    gradients = []
    for penalty in (None, Penalty(made, 0.1, 0.0)):
        made.penalty, made.first_here, made.calls = penalty, True, 0
        made.sparse_values.data.copy_(values)
        made.sparse_values.grad = None
        for _ in range(2):  # two micro-batches
            made(X).sum().backward()
        gradients.append(made.sparse_values.grad.clone())
    torch.testing.assert_close(gradients[1] - gradients[0], absolute)
