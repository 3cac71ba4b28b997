"""Optimizers: a file a kind; optimizer.py is the contract, groups.py what trains at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch
from torch import nn

from checkpointing import Held
from trainer.errors import Refused
from trainer.methods.method import Method
from trainer.optimizers.groups import param_groups, whole_shapes
from trainer.optimizers.optimizer import OptimizerKind
from trainer.options.config import Config
from trainer.plan import Topology


def optimizer_of(config: Config) -> OptimizerKind:
    """The chosen kind, which is imported only now."""
    module, _, name = config.optimizer.made_by.partition(":")
    made: OptimizerKind = getattr(import_module(module), name)(config)
    return made


def suits(kind: OptimizerKind, model: nn.Module, topology: Topology) -> bool:
    """Whether an optimizer accepts a model, which is on meta, under these degrees."""
    try:
        kind.refuse(model, topology)
    except Refused:
        return False
    return True


def make_optimizer(
    model: nn.Module,
    config: Config,
    method: Method,
    scales: Mapping[str, float],
    held: Mapping[str, Held] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of what trains of a model: the method's own, or of the chosen kind.

    `scales` are `lr_scales` of the whole model, and `held` says of what a tensor-parallel rank has a part.
    """
    groups = param_groups(model, config.optimizer, scales, method.decays)
    return method.optimizer(groups, lambda: optimizer_of(config).make(groups, whole_shapes(model, held or {})))
