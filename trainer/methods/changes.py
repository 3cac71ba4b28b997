"""Statistics of fine-tuning: the density of every layer, and the sparsity of the difference of two checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from trainer.methods.deltas import Delta

CLOSE = 1e-5  # absolute: differences up to here count as none (Mukherjee et al. 2025, arXiv:2505.11711)


@dataclass(frozen=True)
class Change:
    """How one weight changed. `density` is the share that may have, `changed` the share that did."""

    name: str
    numel: int
    selected: int
    density: float
    changed: float
    largest: float  # absolute difference
    rms: float  # over the selected entries


def changes(delta: Delta) -> list[Change]:
    found = []
    for name, shape in delta.shapes.items():
        pair = delta.low_rank.get(name)
        values = pair.product().reshape(-1) if pair is not None else delta.entries[name].values
        found.append(_change(name, prod(shape), values))
    return found


def _change(name: str, numel: int, values: torch.Tensor) -> Change:
    count = values.numel()
    return Change(
        name,
        numel,
        count,
        count / numel,
        int((values != 0).sum()) / numel,
        float(values.abs().max()) if count else 0.0,
        float(values.float().square().mean().sqrt()) if count else 0.0,
    )


def compare(left: Iterable[tuple[str, torch.Tensor]], right: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """Compare the tensors that both have: the share of entries that are equal, bit for bit and up to `CLOSE`."""
    for name, here in left:
        if (there := right.get(name)) is None or there.shape != here.shape:
            continue
        apart = here.float() - there.float()
        close = torch.isclose(apart, torch.zeros(()), rtol=0.0, atol=CLOSE)
        yield {
            "name": name,
            "numel": here.numel(),
            "equal": int((here == there).sum()),
            "close": int(close.sum()),
            "largest": float(apart.abs().max()) if apart.numel() else 0.0,
        }


def as_rows(found: Iterable[Change]) -> list[dict[str, Any]]:
    return [asdict(change) for change in found]
