"""Watches of a sparse layer's backward: dense gradients of a layer at a time, those of candidates, penalties."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from trainer.methods.selection.choosing import best
from trainer.methods.sparse.layer import SparseConv1D, SparseLayer, Support
from trainer.options.method import Granularity


def full_gradient(
    layer: SparseLayer, gradient: torch.Tensor, inputs: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The gradient of the whole weight, fp32, from a backward's gradient of the output, and its input.

    Collective over it: each rank has its share, and where a key-value head is held twice, a part of its gradient.
    """
    left, right = _sides(layer, gradient, inputs)
    local = (left.t() @ right).float()
    if group is None:
        return local
    whole = local.new_zeros(layer.shape)
    if layer.share is None:
        whole += local
    else:
        rows, columns = (
            torch.cat([torch.arange(a, a + n, device=local.device) for a, n in runs]) for runs in layer.share.ranges
        )
        whole[rows[:, None], columns[None]] = local
    dist.all_reduce(whole, group=group)
    return whole


def _sides(layer: SparseLayer, gradient: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (inputs, gradient) if isinstance(layer, SparseConv1D) else (gradient, inputs)


@dataclass
class GradientWatch:
    """Sums the dense gradients of micro-batches, or their squares: `flush` after each."""

    layer: SparseLayer
    group: dist.ProcessGroup | None
    squared: bool
    total: torch.Tensor | None = None
    _current: torch.Tensor | None = None

    def __call__(self, first: bool, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        found = full_gradient(self.layer, gradient, inputs, self.group)
        self._current = found if self._current is None else self._current.add_(found)

    def flush(self) -> None:
        if self._current is not None:
            if self.squared:
                self._current.square_()
            self.total = self._current if self.total is None else self.total.add_(self._current)
            self._current = None


@dataclass
class ChoiceWatch:
    """The entries that do not train and have the largest gradients of a step's first micro-batch: candidates."""

    layer: SparseLayer
    group: dist.ProcessGroup | None
    count: int
    chosen: torch.Tensor | None = None  # flat, sorted; None on ranks that do not compute that micro-batch

    def __call__(self, first: bool, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        if first and self.chosen is None:
            found = full_gradient(self.layer, gradient, inputs, self.group).abs_().reshape(-1)
            found[self.layer.sparse_indices.long()] = -torch.inf
            free = found.numel() - self.layer.sparse_indices.numel()
            self.chosen = best(found, min(self.count, free)).indices


@dataclass
class CandidateWatch:
    """Adds up the gradient at candidates over a step's micro-batches on this rank."""

    layer: SparseLayer
    indices: torch.Tensor
    total: torch.Tensor = field(init=False)
    _support: Support = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.indices.numel(), device=self.indices.device)
        self._support = Support.of(self.indices, self.layer.shape, Granularity.element, self.layer.share)

    def __call__(self, first: bool, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        self.total += self._support.gradient(*_sides(self.layer, gradient, inputs))


@dataclass(frozen=True)
class Penalty:
    """The gradient of what is added to the loss once a step, at a layer's values."""

    layer: SparseLayer
    absolute: float  # weight of every absolute value
    nuclear: float  # and of the nuclear norm of the difference from the base

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        found = values.sign() * self.absolute
        return found + nuclear_gradient(self.layer, values, self.nuclear) if self.nuclear else found


def nuclear_gradient(layer: SparseLayer, values: torch.Tensor, weight: float) -> torch.Tensor:
    """The gradient of `weight` times the nuclear norm of a layer's difference from its base, at its entries.

    U V' of the difference, without what belongs to singular values of zero.
    """
    change = torch.zeros(layer.shape, device=values.device, dtype=torch.float32)
    change.view(-1)[layer.sparse_indices.long()] = values
    left, singular, right = torch.linalg.svd(change, full_matrices=False)
    kept = singular > singular[0] * 1e-6
    direction = (left[:, kept] @ right[kept]).view(-1)
    found: torch.Tensor = direction[layer.sparse_indices.long()] * weight
    return found
