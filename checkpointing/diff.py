"""Compare two generations tensor by tensor, however each was sharded, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch

from checkpointing.format import ExternalTensor, LogicalTensor
from checkpointing.reader import GenerationReader
from checkpointing.stream import boxes, read
from checkpointing.tensors import tensor_bytes


@dataclass(frozen=True, slots=True)
class Difference:
    """How one tensor compares. `max_abs` and `max_rel` (over the larger magnitude) are None where nothing differs."""

    name: str
    state: str  # equal, different, only in a, only in b, external in a, external in b, another shape or dtype
    max_abs: float | None = None
    max_rel: float | None = None


def compare(a: GenerationReader, b: GenerationReader) -> Iterator[Difference]:
    """Every tensor of either by all its names, in order. Equal means every bit; `DamagedError` if one cannot be read.

    External tensors are equal where the hashes of their content are.
    """
    ours, theirs = _names(a), _names(b)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs or name not in ours:
            yield Difference(name, "only in a" if name in ours else "only in b")
            continue
        left, right = ours[name], theirs[name]
        if isinstance(left, ExternalTensor) and isinstance(right, ExternalTensor):
            yield Difference(name, "equal" if left.sha256 == right.sha256 else "different")
        elif isinstance(left, ExternalTensor) or isinstance(right, ExternalTensor):
            yield Difference(name, f"external in {'a' if isinstance(left, ExternalTensor) else 'b'}")
        elif left != right:
            yield Difference(name, "another shape or dtype")
        else:
            yield _compare_tensor(name, a, b)


def _names(reader: GenerationReader) -> dict[str, LogicalTensor | ExternalTensor]:
    manifest = reader.manifest
    aliases = {name: manifest.tensors[stored] for name, stored in manifest.aliases.items()}
    return {**manifest.tensors, **aliases, **manifest.external}


def _compare_tensor(name: str, a: GenerationReader, b: GenerationReader) -> Difference:
    worst_abs, worst_rel, equal = 0.0, 0.0, True
    tensor = a.manifest.tensors[a.manifest.stored_name(name)]
    for box in boxes(tensor.shape, tensor.itemsize):
        left, right = (read(reader, reader.manifest.stored_name(name), box) for reader in (a, b))
        if tensor_bytes(left) == tensor_bytes(right):
            continue
        equal = False
        by, relative = _distance(left, right)
        worst_abs, worst_rel = max(worst_abs, by), max(worst_rel, relative)
    return Difference(name, "equal") if equal else Difference(name, "different", worst_abs, worst_rel)


def _distance(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """The largest absolute and relative difference; infinite where only one of two is a number."""
    if not (left.is_complex() or left.is_floating_point()):
        return _integer_distance(left, right)
    wide = torch.complex128 if left.is_complex() else torch.float64
    x, y = left.to(wide), right.to(wide)
    by = (x - y).abs()
    both = torch.maximum(x.abs(), y.abs())
    by = torch.where(x.isnan() & y.isnan() | (x == y), 0.0, by.nan_to_num(nan=inf))
    relative = torch.where(by == 0, 0.0, by / both).nan_to_num(nan=inf)
    return float(by.max()), float(relative.max())


def _integer_distance(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Exact where a float could not tell two large numbers apart."""
    worst = relative = 0.0
    differing = (left != right).reshape(-1)
    for x, y in zip(left.reshape(-1)[differing].tolist(), right.reshape(-1)[differing].tolist(), strict=True):
        worst = max(worst, float(abs(x - y)))
        relative = max(relative, abs(x - y) / max(abs(x), abs(y)))
    return worst, relative
