"""Figures for a plan: how much will train, as far as a sample of the weights tells, and what that needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from trainer.methods.method import Needs, Sizes
from trainer.methods.sparse.attach import PROMOTED, targets_of
from trainer.methods.sparse.budgets import counts_of, dense_hits
from trainer.methods.sparse.calibration import EARLY, layer_of
from trainer.methods.sparse.layer import bytes_of_places, sparse_layers
from trainer.options.method import Allocator, Growth, Reselection, Sparse

FP32 = 4
SAMPLES, ROWS = 4, 8  # so many rows in a row, at so many places of a weight


def expected_sizes(model: nn.Module, config: Sparse) -> Sizes:
    """How many entries, columns or rows of each layer a plan counts with. `model` has shapes only."""
    targets = {name: target for name, (_, target) in targets_of(model, config).items()}
    if config.allocator is Allocator.threshold:
        config = replace(config, density=share_below(config.threshold, model, list(targets)))
    sizes = {name: count * targets[name].width for name, count in counts_of(config, targets).items()}
    promoted = dense_hits(sizes, targets, config.promote_rank, config.promote_alpha)
    return {name: PROMOTED if name in promoted else size for name, size in sizes.items()}


@dataclass(frozen=True)
class SparseNeeds(Needs):
    """Bytes beside what every method needs; `places` are where entries lie, what the base has there, and their ages."""

    method: Sparse = field(default_factory=Sparse)
    weight: int = 0  # the largest that is targeted, in fp32
    layer: int = 0  # and all that are targeted of a layer of the model
    most: int = 0  # of `values` in one of them
    base: int = 0  # the model as it was read, where that is read into the memory that it trains in

    def beyond(self, step: int, kept: int, parameters: int) -> int:
        method = self.method
        if method.selector in EARLY:  # gradients of a layer at a time, summed over micro-batches
            return self.base + 2 * self.layer
        if method.schedule is Reselection.rewind:
            return max(0, kept + self.base + 2 * self.layer - step)
        if method.schedule is Reselection.narrow:  # what stays, while another engine takes its part of the base
            part = parameters if parameters < self.base else 0
            return max(0, self.base + part + 8 * self.values - step)
        if method.schedule is Reselection.renew:  # a weight in fp64, what is thought of it, and what trains of a layer
            return max(0, kept + 8 * self.weight + 6 * self.most - step)
        # In a backward: a gradient, its absolute value, and what is the largest of it.
        by_gradient = method.schedule is Reselection.regrow and method.growth is Growth.gradient
        return 4 * self.weight if by_gradient else 0


def needs_of(model: nn.Module, method: Sparse) -> SparseNeeds:
    """Work out the memory of a method from shapes alone."""
    layers: Counter[str] = Counter()
    weights = [0]
    for name, (layer, _) in targets_of(model, method).items():
        weights.append(FP32 * layer.weight.numel())  # type: ignore[operator]
        layers[layer_of(name)] += weights[-1]
    found = list(sparse_layers(model).values())
    sizes = [layer.sparse_values.nbytes for layer in found]
    values = sum(sizes)
    base = 0 if torch.cuda.is_available() else sum(p.nbytes for p in model.parameters()) - values
    places = sum(bytes_of_places(layer, method) for layer in found)
    most = max(layers.values(), default=0)
    return SparseNeeds(values, places, method, max(weights), most, max(sizes, default=0), base)


def share_below(threshold: float, model: nn.Module, layers: Sequence[str]) -> float:
    """The share of the layers' weights that are nearer to zero: of a sample of the model's files, or as they begin."""
    settings: Any = getattr(model, "config", None)
    below = total = 0.0
    endings = tuple({f".{name.rpartition('.')[2]}.weight" for name in layers})
    for path in _files(settings):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    if f".{name}".endswith(endings) and len(shape := file.get_slice(name).get_shape()) == 2:
                        found = _sample(file.get_slice(name), shape[0]).abs() < threshold
                        below += math.prod(shape) * float(found.float().mean())
                        total += math.prod(shape)
        except (OSError, SafetensorError):
            continue  # whoever reads all of it says so
    if total:
        return below / total
    deviation = getattr(settings, "initializer_range", None) or 0.02
    return math.erf(threshold / (deviation * math.sqrt(2)))


def _files(settings: Any) -> list[Path]:
    """A model's weights on this machine: in its directory, or where the hub's cache has it."""
    name = getattr(settings, "name_or_path", "") or ""
    directory = Path(name) if name else None
    if directory is not None and not directory.is_dir():
        try:
            known = try_to_load_from_cache(name, "config.json", revision=getattr(settings, "_commit_hash", None))
        except HFValidationError:
            return []
        directory = Path(known).parent if isinstance(known, str) else None
    return sorted(directory.glob("*.safetensors")) if directory is not None else []


def _sample(weight: Any, rows: int) -> torch.Tensor:
    starts = [max(0, rows - ROWS) * number // max(1, SAMPLES - 1) for number in range(SAMPLES)]
    return torch.cat([weight[start : start + ROWS].float() for start in starts])
