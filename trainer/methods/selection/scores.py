"""Selectors: a score for every entry of a weight, higher is better. Pure, and the same on every machine and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.elastic.randomness import derive
from trainer.options.method import Granularity, Selector


@dataclass(frozen=True)
class Subject:
    """A weight to be scored, whole, of shape (rows, columns), and what is known of it."""

    weight: torch.Tensor
    key: int  # of its random draws
    rank: int  # of its approximation
    base: torch.Tensor | None = None  # before a full phase
    gradient: torch.Tensor | None = None  # or the sum of squared ones


def random(subject: Subject) -> torch.Tensor:
    """Drawn on the CPU, so that a GPU draws the same."""
    generator = torch.Generator().manual_seed(subject.key)
    drawn = torch.rand(subject.weight.shape, generator=generator, dtype=torch.float64)
    return drawn.to(subject.weight.device)


def magnitude(subject: Subject) -> torch.Tensor:
    return subject.weight.abs()


def smallest(subject: Subject) -> torch.Tensor:
    return -subject.weight.abs()


def low_rank(subject: Subject) -> torch.Tensor:
    """The absolute best approximation of a rank: principal weights (Liu et al. 2025, arXiv:2506.00772).

    By the eigenvectors of the smaller Gram matrix, in float64: nothing is drawn, and the square of the condition costs
    nothing among the largest.
    """
    weight = subject.weight.double()
    wide = weight.shape[0] <= weight.shape[1]
    gram = weight @ weight.t() if wide else weight.t() @ weight
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -min(subject.rank, gram.shape[0]) :]
    near = vectors @ (vectors.t() @ weight) if wide else (weight @ vectors) @ vectors.t()
    found: torch.Tensor = near.abs().float()
    return found


def gradient(subject: Subject) -> torch.Tensor:
    assert subject.gradient is not None
    return subject.gradient.abs()


def squared_gradient(subject: Subject) -> torch.Tensor:
    assert subject.gradient is not None
    return subject.gradient


def delta(subject: Subject) -> torch.Tensor:
    assert subject.base is not None
    return (subject.weight.float() - subject.base.float()).abs()


SCORES: dict[Selector, Callable[[Subject], torch.Tensor]] = {
    Selector.random: random,
    Selector.magnitude: magnitude,
    Selector.smallest: smallest,
    Selector.low_rank: low_rank,
    Selector.gradient: gradient,
    Selector.squared_gradient: squared_gradient,
    Selector.delta: delta,
}


def scores_of(selector: Selector, subject: Subject, granularity: Granularity, width: int) -> torch.Tensor:
    """One-dimensional: of every entry in row-major order, or of every slice of `width` columns or rows."""
    found = SCORES[selector](subject)
    if granularity is Granularity.element:
        return found.reshape(-1)
    if selector is Selector.random:  # a sum of draws would be one draw less random
        num = subject.weight.shape[1 if granularity is Granularity.inputs else 0] // width
        return torch.rand(num, generator=torch.Generator().manual_seed(subject.key), dtype=torch.float64)
    return found.double().sum(0 if granularity is Granularity.inputs else 1).reshape(-1, width).sum(1)


def selection_key(seed: int, name: str, number: int) -> int:
    """The key of the random draws of a weight's selection; the first selection is number 0."""
    return derive(seed, "select", name, number)
