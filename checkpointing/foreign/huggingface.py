"""A Hugging Face directory: safetensors, or what torch.save wrote, by the names of parameters."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import safe_open

from checkpointing.errors import DamagedError, MismatchError
from checkpointing.foreign.archive import Mapped, read_archive
from checkpointing.foreign.state import Foreign, as_buffers_too
from checkpointing.geometry import Piece
from checkpointing.hub_names import HubNames, are_apart, hub_names, whole
from checkpointing.small_files import read_object

logger = logging.getLogger("checkpointing")

SAFE, TORCH = "model.safetensors", "pytorch_model.bin"


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, safetensors before others; none where this is no such directory."""
    for name in (SAFE, TORCH):
        index = directory / f"{name}.index.json"
        if index.is_file():
            return sorted({directory / Path(file).name for file in read_object(index)["weight_map"].values()})
        if (directory / name).is_file():
            return [directory / name]
    return []


def describe_hugging_face(directory: Path) -> Foreign:
    """The model's parameters under its own names, experts of a layer as the one tensor that transformers makes of them.

    There are no moments by name in such a directory.
    """
    files = weight_files(directory)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= _safe(file) if file.suffix == ".safetensors" else _torch(file)
    names, why = HubNames({}, {}, {}), "its model has other names"
    try:
        names = hub_names(directory)
    except MismatchError as error:
        why = str(error)
    if are_apart([name for name in tensors if name not in names.places]):
        logger.warning("experts are imported one by one, as they lie there: %s", why)
    pieces = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        place = names.places.get(name)
        if place is None or (place.shape != shape and place.box.size == names.shapes[place.tensor]):
            place = whole(name if place is None else place.tensor, shape)  # what is loaded into tells whether it fits
        elif place.shape != shape:
            raise DamagedError(f"{name} is of shape {shape}, and {place.shape} by its config.json")
        whole_shape = shape if place.box.size == shape else names.shapes[place.tensor]
        pieces.append(Piece(f"model/{place.tensor}", tensor.reshape(place.box.size), place.box.offset, whole_shape))
    state = directory / "trainer_state.json"
    step = read_object(state).get("global_step") if state.is_file() else None
    left_out = [name for name in ("optimizer.pt", "scheduler.pt") if (directory / name).is_file()]
    return Foreign(
        f"Hugging Face directory, {len(files)} file{'s' * (len(files) > 1)}", step, as_buffers_too(pieces), left_out
    )


def _safe(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
    except OSError:
        raise
    except Exception as error:  # of the library's own kind
        raise DamagedError(f"{path} is damaged: {error}") from error


def _torch(path: Path) -> dict[str, torch.Tensor]:
    read = read_archive(Mapped.of(path))
    if not isinstance(read, dict) or not all(isinstance(value, torch.Tensor) for value in read.values()):
        raise DamagedError(f"{path} is no state dict of a model")
    return {str(name): tensor for name, tensor in read.items()}
