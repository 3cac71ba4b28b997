"""The optimizer and its param groups, the same for every engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from checkpointing import parameter_names
from trainer.config import Optimizer, rates_by_pattern
from trainer.errors import Refused


def lr_scales(model: nn.Module, config: Optimizer) -> dict[str, float]:
    """What optimizer.lr_scale multiplies the learning rate of each trained parameter by, under all of its names.

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


def param_groups(model: nn.Module, config: Optimizer, scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """What trains; matrices decay, norms and biases do not. `scales` are `lr_scales`, of at least these parameters."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, name in {parameter: name for name, parameter in parameter_names(model).items()}.items():
        if parameter.requires_grad:
            groups.setdefault((scales[name], parameter.dim() >= 2), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": config.weight_decay if key[1] else 0.0, "lr_scale": key[0]}
        for key in sorted(groups, reverse=True)
    ]


def make_optimizer(model: nn.Module, config: Optimizer, scales: Mapping[str, float]) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        param_groups(model, config, scales),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def set_lr(groups: list[dict[str, Any]], lr: float) -> None:
    """The learning rate of a step, in all param groups."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
