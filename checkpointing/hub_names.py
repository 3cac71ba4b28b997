"""Which part of a model's tensors each tensor of a Hugging Face directory is: several may be one, and names others.

transformers computes the experts of a layer as one tensor, which such directories hold apart. How is told by itself: it
takes the tensors apart without their values, and every result says where it lies.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpointing.errors import MismatchError
from checkpointing.geometry import Box, Shape
from checkpointing.small_files import read_json
from checkpointing.stream import boxes

# Names that only a model with experts has: in memory, and in a directory.
_FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj|up_proj)$")
_APART = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A tensor of a directory, of this shape: a box of a tensor of the model, whose leading sizes may be 1."""

    tensor: str
    box: Box
    shape: Shape  # without them

    def parts(self, itemsize: int) -> Iterator[Box]:
        """Boxes of the model's tensor, of a bounded size, which one after the other are the bytes of this one."""
        lead = len(self.box.size) - len(self.shape)
        for part in boxes(self.shape, itemsize):
            offset = (
                *self.box.offset[:lead],
                *(a + b for a, b in zip(self.box.offset[lead:], part.offset, strict=True)),
            )
            yield Box(offset, (*self.box.size[:lead], *part.size))


def whole(tensor: str, shape: Shape) -> HubPlace:
    return HubPlace(tensor, Box((0,) * len(shape), shape), shape)


def are_fused(names: Collection[str]) -> bool:
    """Whether a model's tensors of these names may be several of a directory's."""
    return any(_FUSED.search(name) for name in names)


def are_apart(names: Collection[str]) -> bool:
    """Whether a directory's tensors of these names may be parts of a model's."""
    return any(_APART.search(name) for name in names)


@dataclass(frozen=True, slots=True)
class HubNames:
    """How transformers names what the model of a config.json holds."""

    places: dict[str, HubPlace]  # by the names of a directory's tensors
    shapes: dict[str, Shape]  # of the model's own tensors, by their names in memory
    tied: dict[str, str]  # names in memory that a directory leaves out, and those they are tied to


def hub_names(description: Path) -> HubNames:
    """Names for the model of a directory's config.json. Nothing of code that comes with a model is run.

    `MismatchError` where transformers does not know the model, or makes numbers of others.
    """
    try:
        model, state = _skeleton(description)
        lies = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
        from transformers.core_model_loading import revert_weight_conversion

        with _Views():  # type: ignore[no-untyped-call]
            found = revert_weight_conversion(model, state)
    except Exception as error:  # whatever is in that file
        raise MismatchError(
            f"how the tensors of {description} are named is not known ({type(error).__name__}: {error})"
        ) from error
    placed = {}
    for name, tensor in found.items():
        of = lies.get(tensor.untyped_storage()._cdata)
        if of is None or (place := _place(of, state[of], tensor)) is None:
            raise MismatchError(f"transformers makes {name} of several tensors of the model, or in another order")
        placed[name] = place
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return HubNames(placed, shapes, dict(getattr(model, "all_tied_weights_keys", None) or {}))


def _skeleton(description: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model without values, and what its state dict holds, each with a storage of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if "auto_map" in read_json(description / "config.json"):
        raise ValueError("the model has code of its own")
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(description, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        state = model.state_dict()
        return model, {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}


class _Views(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies are views: what a result is a part of stays known."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))


def _place(name: str, base: torch.Tensor, part: torch.Tensor) -> HubPlace | None:
    """Where a view begins in its base, if its elements are a box of it."""
    lead = base.dim() - part.dim()
    if lead < 0 or any(
        a != b for a, b, n in zip(part.stride(), base.stride()[lead:], part.shape, strict=True) if n > 1
    ):
        return None
    offset, left = [], part.storage_offset()
    for stride in base.stride():
        offset.append(left // max(stride, 1))
        left %= max(stride, 1)
    box = Box(tuple(offset), (*(1,) * lead, *part.shape))
    return HubPlace(name, box, tuple(part.shape)) if box.within(tuple(base.shape)) else None
