"""Pieces of a torch module and its optimizer, under their logical names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer

from checkpointing.errors import LayoutError
from checkpointing.geometry import Piece
from checkpointing.layouts.dtensor import pieces_of

# What wrappers by name put into names: torch.compile and activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")


def describe(model: nn.Module, optimizer: Optimizer | None = None) -> list[Piece]:
    """The pieces of a model's parameters and persistent buffers, and of its optimizer's state, on this rank.

    Names are `model/<fqn>`, `buffer/<fqn>` and `optim/<fqn>/<key>`, with the names of wrappers removed. Tensors may
    be plain or DTensors of any mesh. Optimizer state that does not exist yet is created (`materialize`), so that a
    fresh optimizer can be loaded into. Options of param groups are not state here: pass them in `objects`.
    """
    # Wrapping is undone by object, not by name alone: a model may have a child that is called `module`.
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    pieces = [p for name, t in _named(bare.named_parameters()) for p in pieces_of(f"model/{name}", t)]
    pieces += [p for name, t in _named(_persistent_buffers(bare)) for p in pieces_of(f"buffer/{name}", t)]
    if optimizer is not None:
        names = {parameter: name for name, parameter in _named(bare.named_parameters())}
        materialize(optimizer)
        for parameter, key, value in _state(optimizer):
            if parameter not in names:
                raise LayoutError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model"
                )
            pieces += pieces_of(f"optim/{names[parameter]}/{key}", value)
    return pieces


def materialize(optimizer: Optimizer) -> None:
    """Create the state that an optimizer would only create in its first step, leaving parameters as they are.

    A step with zero gradients and a learning rate of zero creates it; step counts are put back to zero. Parameters
    that do not require a gradient, and those that have state already, are left alone.
    """
    fresh = [
        (group, [p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)])
        for group in optimizer.param_groups
    ]
    if not any(parameters for _, parameters in fresh):
        return
    gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for p in gradients:
            p.grad = None
        for group, parameters in fresh:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
            for p in parameters:
                p.grad = torch.zeros_like(p)
        optimizer.step()
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for _, parameters in fresh:
        for p in parameters:
            step = optimizer.state[p].get("step")
            if isinstance(step, torch.Tensor):
                step.zero_()


def _named(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield _WRAPPERS.sub("", name), tensor


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a state dict would hold; the others are derived and rebuilt with the model."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _state(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, str, torch.Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor):
                    raise LayoutError(
                        f"the optimizer keeps {key} as a {type(value).__name__}; only tensors can be described, "
                        "so save it in `objects`"
                    )
                yield parameter, key, value
