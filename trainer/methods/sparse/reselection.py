"""Re-selections of the entries of one layer: pure functions of whole vectors, the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainer.methods.entries import Entries

Moments = Mapping[str, torch.Tensor]  # of an optimizer, each of the values' shape


@dataclass
class Candidates:
    """Entries that may grow: their gradients summed over the window, and Adam's moments as if they trained."""

    indices: torch.Tensor
    sums: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @staticmethod
    def of(indices: torch.Tensor) -> Candidates:
        zeros = (torch.zeros(indices.numel(), device=indices.device) for _ in range(3))
        return Candidates(indices, *zeros)

    def add(self, gradient: torch.Tensor, clip: float, betas: tuple[float, float]) -> None:
        """A step's gradient; Adam would have seen it times `clip`."""
        self.sums += gradient
        gradient = gradient * clip
        self.exp_avg.lerp_(gradient, 1 - betas[0])
        self.exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])


@dataclass(frozen=True)
class Renewed:
    """Entries that train from here on, and what they take along; the base of `fresh` ones is still to be read."""

    entries: Entries
    moments: dict[str, torch.Tensor]
    settled: Entries
    fresh: torch.Tensor  # positions among the entries


def number_to_replace(rate: float, count: int, position: int, steps: int, *, first: bool) -> int:
    """All of a random start at the first re-selection, then a share that falls linearly to zero at the last step."""
    return count if first else math.floor(rate * (1 - position / steps) * count)


def regrow(
    entries: Entries,
    moments: Moments,
    dropped: torch.Tensor,
    grown: torch.Tensor,
    seeds: Moments,
) -> Renewed:
    """Drop the entries at positions `dropped`, and train `grown` from zero instead, with `seeds` as their moments.

    After Ansell et al. 2024 (SpIEL, arXiv:2401.16405).
    """
    kept = torch.ones_like(entries.indices, dtype=torch.bool)
    kept[dropped] = False
    stay = kept.nonzero()[:, 0]
    indices = torch.cat([entries.indices[stay], grown.to(entries.indices.dtype)])
    order = indices.argsort()
    zeros = entries.values.new_zeros(grown.numel())

    def carried(whole: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole[stay], new.to(whole.dtype)])[order]

    originals = carried(entries.originals, torch.zeros_like(zeros))
    return Renewed(
        Entries(indices[order], carried(entries.values, zeros), originals),
        {key: carried(whole, seeds.get(key, zeros)) for key, whole in moments.items()},
        Entries.none(entries.indices.dtype, entries.originals.dtype, indices.device),
        (order >= stay.numel()).nonzero()[:, 0],
    )


def renew(entries: Entries, moments: Moments, settled: Entries, chosen: torch.Tensor) -> Renewed:
    """Train `chosen` (sorted). What is left keeps its value and trains no more, and goes on from it when it comes back.

    Moments stay with entries that stay and start at zero for others, as in Liu et al. 2025 (LIFT, arXiv:2506.00772).
    """
    chosen = chosen.to(entries.indices.dtype)
    before, here = _found(chosen, entries.indices)
    back, there = _found(chosen, settled.indices)
    values = torch.zeros(chosen.numel(), device=chosen.device)
    originals = torch.zeros(chosen.numel(), dtype=entries.originals.dtype, device=chosen.device)
    values[here], originals[here] = entries.values[before], entries.originals[before]
    values[there], originals[there] = settled.values[back], settled.originals[back]
    carried = {}
    for key, whole in moments.items():
        carried[key] = torch.zeros_like(values, dtype=whole.dtype)
        carried[key][here] = whole[before]
    fresh = torch.ones_like(chosen, dtype=torch.bool)
    fresh[here] = fresh[there] = False
    return Renewed(
        Entries(chosen, values, originals),
        carried,
        settled.at(_others(settled.indices, back)).joined(entries.at(_others(entries.indices, before))),
        fresh.nonzero()[:, 0],
    )


def _found(wanted: torch.Tensor, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions among sorted indices of those of `wanted` that are there, and their positions in `wanted`."""
    if not among.numel():
        nothing = torch.empty(0, dtype=torch.int64, device=wanted.device)
        return nothing, nothing
    places = torch.searchsorted(among, wanted).clamp_(max=among.numel() - 1)
    there = (among[places] == wanted).nonzero()[:, 0]
    return places[there], there


def _others(indices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    left = torch.ones_like(indices, dtype=torch.bool)
    left[positions] = False
    return left.nonzero()[:, 0]
