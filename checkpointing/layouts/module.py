"""Pieces of a torch module and its optimizer, under their logical names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop

from checkpointing.errors import LayoutError, MismatchError, first_few
from checkpointing.geometry import Piece, Shape
from checkpointing.layouts.dtensor import Held, of_blocks, pieces_of

logger = logging.getLogger("checkpointing")

# What wrappers by name put into names: torch.compile, activation checkpointing, and peft around an adapted layer's own
# parameters. Not around other adapters: of several parameters of one layer each has its own, one around the other.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:(?:_orig_mod|_checkpoint_wrapped_module)\.|(?:base_layer\.)+(?=[^.]+$))")


Entry = tuple[nn.Module | None, Optimizer | None]


@torch.no_grad()  # views of a shard need no place in a graph, and cost half as much without
def describe(
    model: nn.Module | Mapping[str, Entry],
    optimizer: Optimizer | None = None,
    *,
    logical: Mapping[str, Shape | Held] | None = None,
) -> list[Piece]:
    """The pieces of a model's parameters and persistent buffers, and of its optimizer's state, on this rank.

    Names are `model/<fqn>`, `buffer/<fqn>` and `optim/<fqn>/<key>`, with the names of wrappers removed; a tied tensor
    has a piece under each of its names. Tensors may be plain or DTensors of any mesh; what FSDP2 keeps gathered is
    sharded again. Optimizer state that does not exist yet is created (`materialize`), so that a fresh optimizer can be
    loaded into. Options of param groups are not tensors: see `param_groups`.

    Several models and optimizers are given as `{"actor": (model, optimizer), "ema": (model, None)}` and named
    `model/actor/<fqn>`, `optim/actor/<fqn>/<key>`, ...; one without a model holds parameters of the others'. Where the
    engine pads a parameter, `logical` has its shape without padding under its name (`<fqn>`, `actor/<fqn>`), and where
    it has cut one, what it holds of it; for its optimizer state as well, also where that has one value for a block of
    a row, such as the scales of quantised moments. `LayoutError` for FSDP1, whose flat parameters do not say what they
    hold.
    """
    entries = _entries(model, optimizer)
    shapes = logical or {}
    padded = {name: parameter.shape for name, parameter in _all_parameters(entries) if name in shapes}
    if unknown := sorted(shapes.keys() - padded.keys()):
        raise LayoutError(f"logical: there is no parameter named {first_few(unknown)}")
    pieces: list[Piece] = []
    for prefix, module in _modules(entries):
        _prepare(module)
        for name, tensor in _parameters(module, prefix):
            pieces += pieces_of(f"model/{name}", tensor, shapes.get(name))
        for name, tensor in _named(_persistent_buffers(module)):
            pieces += [replace(p, volatile=True) for p in pieces_of(f"buffer/{prefix}{name}", tensor)]
    for owner, name, key, value in _optimizer_state(entries):
        stored = f"optim/{owner}{name.removeprefix(owner)}/{key}"
        shape = of_blocks(stored, shapes[name], padded[name], value.shape) if name in shapes else None
        pieces += pieces_of(stored, value, shape)
    return pieces


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by the name that `describe` gives it, without its prefix; a tied one by all its names.

    `LayoutError` where that is the name of two.
    """
    found: dict[str, nn.Parameter] = {}
    for name, parameter in _parameters(_unwrapped(model), ""):
        if isinstance(parameter, nn.Parameter) and found.setdefault(name, parameter) is not parameter:
            raise LayoutError(f"two parameters are named {name} when the names of wrappers are left out")
    return found


def param_groups(model: nn.Module | Mapping[str, Entry], optimizer: Optimizer | None = None) -> dict[str, Any]:
    """The options of all param groups by the names of their parameters, as plain JSON for `objects`.

    Every group is `{"parameters": [names], "options": {...}}` under its optimizer's name (empty by default).
    """
    entries = _entries(model, optimizer)
    names = _first_names(entries)
    return {
        owner.removesuffix("/"): [
            {
                "parameters": _names_in(names, group),
                "options": {key: _plain(key, value) for key, value in group.items() if key != "params"},
            }
            for group in held.param_groups
        ]
        for owner, (_, held) in entries.items()
        if held is not None
    }


def restore_param_groups(
    saved: Mapping[str, Any], model: nn.Module | Mapping[str, Entry], optimizer: Optimizer | None = None
) -> None:
    """Give every param group the options that its parameters were saved with, however they were grouped.

    `MismatchError` if a parameter was not saved, or parameters of one group were saved with different options.
    """
    entries = _entries(model, optimizer)
    names = _first_names(entries)
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for owner, (_, held) in entries.items():
        if held is None:
            continue
        options = {name: g["options"] for g in saved.get(owner.removesuffix("/"), ()) for name in g["parameters"]}
        for group in held.param_groups:
            own = _names_in(names, group)
            if missing := [name for name in own if name not in options]:
                raise MismatchError(f"no options of a param group were saved for {first_few(missing)}")
            if other := next((name for name in own if options[name] != options[own[0]]), None):
                raise MismatchError(
                    f"{own[0]} and {other} are in one param group here and were saved with different options; "
                    "group them as they were"
                )
            if own:
                found.append((group, options[own[0]]))
    for group, chosen in found:
        for key, value in chosen.items():
            before = group.get(key)
            if isinstance(before, torch.Tensor):
                before.fill_(value)  # a compiled or captured step holds on to the tensor
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _names_in(names: Mapping[torch.Tensor, str], group: Mapping[str, Any]) -> list[str]:
    unknown = next((p for p in group["params"] if p not in names), None)
    if unknown is not None:
        raise LayoutError(f"the optimizer holds a parameter of shape {tuple(unknown.shape)} that is not in the model")
    return [names[p] for p in group["params"]]


def _plain(key: str, value: Any) -> Any:
    """An option as JSON; tuples, such as Adam's betas, as lists."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(key, one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise LayoutError(f"the option {key} of a param group is a {type(value).__name__}, which JSON does not know")


def _entries(model: nn.Module | Mapping[str, Entry], optimizer: Optimizer | None) -> dict[str, Entry]:
    """Modules and optimizers by the prefix of their tensors' names: empty, or ending in a slash."""
    if isinstance(model, nn.Module):
        return {"": (model, optimizer)}
    if optimizer is not None:
        raise LayoutError("give the optimizer of each model with it: describe({name: (model, optimizer), ...})")
    for name in model:
        if "/" in name:
            raise LayoutError(f"{name!r} cannot name a model: names of models have no slash")
    return {f"{name}/" if name else "": entry for name, entry in model.items()}


def _modules(entries: Mapping[str, Entry]) -> Iterator[tuple[str, nn.Module]]:
    for prefix, (module, _) in entries.items():
        if module is not None:
            yield prefix, _unwrapped(module)


def _parameters(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under each of its names: tied ones have several."""
    return ((prefix + name, p) for name, p in _named(module.named_parameters(remove_duplicate=False)))


def _all_parameters(entries: Mapping[str, Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in _modules(entries):
        yield from _parameters(module, prefix)


def _first_names(entries: Mapping[str, Entry]) -> dict[torch.Tensor, str]:
    names: dict[torch.Tensor, str] = {}
    for name, parameter in _all_parameters(entries):
        names.setdefault(parameter, name)
    return names


def _prepare(module: nn.Module) -> None:
    for path, child in module.named_modules():
        if isinstance(child, FSDPModule):
            child.reshard()  # after a forward without a backward the root's parameters are gathered copies
        if type(child).get_extra_state is not nn.Module.get_extra_state:
            logger.warning("the extra state of %s (%s) is not described", path or "the model", type(child).__name__)


def _optimizer_state(entries: Mapping[str, Entry]) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """The optimizer's name, the parameter's, the key and the tensor; under all names of a tied parameter."""
    names: dict[torch.Tensor, list[str]] = {}
    for name, parameter in _all_parameters(entries):
        names.setdefault(parameter, []).append(name)
    for owner, (_, optimizer) in entries.items():
        if optimizer is None:
            continue
        materialize(optimizer)
        for parameter, key, value in _state(optimizer):
            if parameter not in names:
                raise LayoutError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model"
                )
            for name in names[parameter]:
                yield owner, name, key, value


def materialize(optimizer: Optimizer) -> None:
    """Create the state that an optimizer would only create in its first step, leaving parameters as they are.

    Parameters that do not require a gradient, and those that have state already, are left alone. An optimizer that has
    a method `prepare` does it by itself. `LayoutError` where an optimizer is not known to go on afterwards as if
    nothing had happened.
    """
    if callable(prepare := getattr(optimizer, "prepare", None)):
        prepare()
        return
    fresh = [
        (group, [p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)])
        for group in optimizer.param_groups
    ]
    if not any(parameters for _, parameters in fresh):
        return
    if type(optimizer) not in _ZERO_STATE_IS_NO_STATE or any(g.get("dampening") for g, _ in fresh):
        raise LayoutError(
            f"{type(optimizer).__name__} has no state yet for some parameters, and creating it here would change what "
            "it computes. Take its first step, with a gradient for every parameter, before describing it."
        )
    for group, parameters in fresh:
        options = {key: value for key, value in group.items() if key != "params"}
        probes: dict[tuple[torch.dtype, torch.device], dict[str, Any]] = {}
        for p in parameters:
            kind = (p.dtype, p.device)
            if kind not in probes:
                probes[kind] = _state_of_one(type(optimizer), options, *kind)
            optimizer.state[p] = {key: _zeros(value, p) for key, value in probes[kind].items()}


def _state_of_one(
    kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The optimizer's state of a parameter with one element after a step: its keys and their forms."""
    probe = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))
    probe.grad = torch.zeros_like(probe)
    optimizer = kind([{**options, "params": [probe]}])  # type: ignore[call-arg]
    optimizer.step()
    return dict(optimizer.state[probe])


def _zeros(value: Any, parameter: torch.Tensor) -> Any:
    """A state of the parameter's shape, or a scalar."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros_like(value) if value.dim() == 0 else torch.zeros_like(parameter, dtype=value.dtype)


# Their first step computes the same from no state as from zeros. Not so SGD with dampening, whose first momentum is the
# whole gradient, nor optimizers that keep products of schedules or step sizes, nor what a subclass may do.
_ZERO_STATE_IS_NO_STATE = (Adam, AdamW, SGD, Adagrad, RMSprop, Adadelta)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Undone by object where that is possible, not by name: a model may have a child that is called `module`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None) or _inside_peft(model), nn.Module):
            model = inner
        else:
            return model


def _inside_peft(model: nn.Module) -> nn.Module | None:
    """The model that peft has put its layers into, if the wrapper has no parameters of its own, as prompts are."""
    inside: Any = getattr(model, "get_base_model", None)
    inner = inside() if hasattr(model, "peft_config") and callable(inside) else None
    if not isinstance(inner, nn.Module) or inner is model:
        return None
    return inner if len(list(inner.parameters())) == len(list(model.parameters())) else None


def _named(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if getattr(tensor, "_is_flat_param", False):
            raise LayoutError(f"{name} is a flat parameter of FSDP1, which is not supported; use FSDP2 (fully_shard)")
        yield _WRAPPERS.sub("", name), tensor


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that a state dict would hold; the others are derived and rebuilt with the model."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
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
