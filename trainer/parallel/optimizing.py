"""The optimizer and its param groups, the same for every engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from checkpointing import Held, parameter_names
from trainer.check import rates_by_pattern
from trainer.choices import Growth, Reselection, Sparse
from trainer.config import Config, Implementation, Optimizer
from trainer.errors import Refused
from trainer.methods.sparse.entry_optimizers import EntryAdamW, EntrySM3
from trainer.methods.sparse.layer import VALUES
from trainer.parallel.eight_bit import EightBitAdamW, parameters_in_blocks


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
    """What trains; matrices and sparse values decay, norms and biases do not. `scales` are `lr_scales`, of these at
    least."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, name in {parameter: name for name, parameter in parameter_names(model).items()}.items():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 or name.endswith(VALUES)
            groups.setdefault((scales[name], decays), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": config.weight_decay if key[1] else 0.0, "lr_scale": key[0]}
        for key in sorted(groups, reverse=True)
    ]


def make_optimizer(
    model: nn.Module, config: Config, scales: Mapping[str, float], held: Mapping[str, Held] | None = None
) -> torch.optim.Optimizer:
    """AdamW; of values that are selected anew with an age of their own, or SM3 where a method grows by it.

    `held` says of what the parameters of a tensor-parallel rank are a part.
    """
    options, method = config.optimizer, config.method
    groups, betas = param_groups(model, options, scales), (options.betas[0], options.betas[1])
    if isinstance(method, Sparse) and method.schedule is Reselection.regrow and method.growth is Growth.sm3:
        return EntrySM3(groups, lr=options.lr, eps=options.eps)
    if isinstance(method, Sparse) and method.schedule not in (Reselection.once, Reselection.rewind):
        return EntryAdamW(groups, lr=options.lr, betas=betas, eps=options.eps)
    if options.implementation is Implementation.torchao_8bit:
        blocked = parameters_in_blocks(model, held or {})
        return EightBitAdamW(groups, blocked, lr=options.lr, betas=betas, eps=options.eps)
    kernels: dict[str, Any] = {options.implementation.value: True}
    return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, **kernels)


def set_lr(groups: list[dict[str, Any]], lr: float) -> None:
    """The learning rate of a step, in all param groups."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
