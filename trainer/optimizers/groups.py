"""Param groups of every optimizer under every engine: trained parameters by learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from checkpointing import Held, parameter_names
from trainer.errors import Refused
from trainer.options.optimizer import Optimizer, rates_by_pattern


def lr_scales(model: nn.Module, config: Optimizer) -> dict[str, float]:
    """Factors of the learning rate by optimizer.lr_scale, of each trained parameter, under all of its names.

    Of the whole model: where a tied tensor is taken apart, only one of its names is left on each side. `Refused` for a
    pattern that matches nothing. Not collective.
    """
    by_parameter: dict[nn.Parameter, list[str]] = {}
    for name, parameter in parameter_names(model).items():
        if parameter.requires_grad:
            by_parameter.setdefault(parameter, []).append(name)
    given = rates_by_pattern(config.lr_scale)
    unused, scales = set(given), dict[str, float]()
    for names in by_parameter.values():
        matching = [pattern for pattern in given if any(re.search(pattern, name) for name in names)]
        unused -= set(matching)
        scales |= dict.fromkeys(names, given[matching[0]] if matching else 1.0)
    if unused:
        raise Refused(
            f"optimizer.lr_scale names {min(unused)}, which is found in no name of what trains, such as "
            f"{', '.join(list(scales)[:3])}. Type another pattern, or leave it out."
        )
    return scales


def param_groups(
    model: nn.Module,
    config: Optimizer,
    scales: Mapping[str, float],
    decays: Callable[[str, nn.Parameter], bool],
) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and weight decay. `scales` are `lr_scales`, of these at least."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, name in {parameter: name for name, parameter in parameter_names(model).items()}.items():
        if parameter.requires_grad:
            groups.setdefault((scales[name], decays(name, parameter)), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": config.weight_decay if key[1] else 0.0, "lr_scale": key[0]}
        for key in sorted(groups, reverse=True)
    ]


def whole_shapes(model: nn.Module, held: Mapping[str, Held]) -> dict[nn.Parameter, tuple[int, ...]]:
    """The shape of every trained parameter before it was cut; `held` says of what a tensor-parallel rank has a part."""
    return {
        parameter: tuple(held[name].shape if name in held else parameter.shape)
        for name, parameter in parameter_names(model).items()
        if parameter.requires_grad
    }
