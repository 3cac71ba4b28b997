"""Some entries of a weight: their places, how far they are from the base, and what the base has there."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Entries:
    """Entries of a weight, by their flat indices, sorted: the difference from the base, and the base."""

    indices: torch.Tensor
    values: torch.Tensor
    originals: torch.Tensor

    @staticmethod
    def none(indices: torch.dtype, originals: torch.dtype, device: torch.device) -> Entries:
        return Entries(
            torch.empty(0, dtype=indices, device=device),
            torch.empty(0, device=device),
            torch.empty(0, dtype=originals, device=device),
        )

    def at(self, positions: torch.Tensor) -> Entries:
        return Entries(self.indices[positions], self.values[positions], self.originals[positions])

    def joined(self, other: Entries) -> Entries:
        """Both, sorted; they have none in common."""
        indices = torch.cat([self.indices, other.indices])
        order = indices.argsort()
        values, originals = torch.cat([self.values, other.values]), torch.cat([self.originals, other.originals])
        return Entries(indices[order], values[order], originals[order])


def index_dtype(shape: tuple[int, int]) -> torch.dtype:
    return torch.int32 if shape[0] * shape[1] < 2**31 else torch.int64


def added(base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Base plus values, in the base's dtype. A value of zero changes nothing, even where the base is minus zero."""
    changed = (base.float() + values).to(base.dtype)
    return torch.where(values == 0, base, changed)
