"""Pieces of a torch module and its optimizer, under their logical names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop

from checkpointing.errors import LayoutError
from checkpointing.geometry import Piece
from checkpointing.layouts.dtensor import pieces_of

logger = logging.getLogger("checkpointing")

# What wrappers by name put into names: torch.compile and activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")


def describe(model: nn.Module, optimizer: Optimizer | None = None) -> list[Piece]:
    """The pieces of a model's parameters and persistent buffers, and of its optimizer's state, on this rank.

    Names are `model/<fqn>`, `buffer/<fqn>` and `optim/<fqn>/<key>`, with the names of wrappers removed. Tensors may
    be plain or DTensors of any mesh; what FSDP2 keeps gathered is sharded again. Optimizer state that does not exist
    yet is created (`materialize`), so that a fresh optimizer can be loaded into. Options of param groups are not state
    here: pass them in `objects`. `LayoutError` for FSDP1, whose flat parameters do not say what they hold.
    """
    bare = _unwrapped(model)
    for path, module in bare.named_modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without a backward the root's parameters are gathered copies
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            logger.warning("the extra state of %s (%s) is not described", path or "the model", type(module).__name__)
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
    that do not require a gradient, and those that have state already, are left alone. `LayoutError` where an optimizer
    is not known to go on afterwards as if nothing had happened.
    """
    fresh = [
        (group, [p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)])
        for group in optimizer.param_groups
    ]
    if not any(parameters for _, parameters in fresh):
        return
    if not isinstance(optimizer, _ZERO_STATE_IS_NO_STATE) or any(g.get("dampening") for g, _ in fresh):
        raise LayoutError(
            f"{type(optimizer).__name__} has no state yet for some parameters, and creating it here would change what "
            "it computes. Take its first step, with a gradient for every parameter, before describing it."
        )
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


# Their first step computes the same from no state as from zeros. Not so SGD with dampening, whose first momentum is the
# whole gradient, nor optimizers that keep products of schedules or step sizes.
_ZERO_STATE_IS_NO_STATE = (Adam, AdamW, SGD, Adagrad, RMSprop, Adadelta)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Undone by object where that is possible, not by name: a model may have a child that is called `module`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _named(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if getattr(tensor, "_is_flat_param", False):
            raise LayoutError(f"{name} is a flat parameter of FSDP1, which is not supported; use FSDP2 (fully_shard)")
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
