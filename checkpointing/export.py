"""The model of a generation as other programs read it: a Hugging Face directory, or one file of torch.

Read from whatever layout it was saved under, part by part: the memory this takes is that of a part, not of the model.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpointing.errors import (
    BaseNeededError,
    ConfigNeededError,
    DamagedError,
    LayoutError,
    MismatchError,
    NotFoundError,
    first_few,
)
from checkpointing.hub_names import HubPlace, are_fused, hub_names, whole
from checkpointing.reader import GenerationReader
from checkpointing.small_files import DOCUMENT_BYTES, Buffer, read_object, sync_directory
from checkpointing.storage import write_behind
from checkpointing.stream import read_each, read_whole
from checkpointing.tensors import DTYPE_NAMES, DTYPES, tensor_bytes

logger = logging.getLogger("checkpointing")

MODEL, BUFFER = "model/", "buffer/"  # parameters, and buffers that a state dict has
FILE_BYTES = 5_000_000_000  # of a file of weights, as transformers writes them
WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"),
    *("*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.ot"),
)


def export_hugging_face(
    reader: GenerationReader,
    directory: Path,
    description: Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Write the model's parameters as safetensors, with the files of `description` (config.json, the tokenizer).

    `dtype` is what floating-point parameters are rounded to; None keeps what they were trained in. Returns how many
    numbers were written. The directory is there when it is whole. `MismatchError` for a generation that does not hold
    a whole model, `NotFoundError` without a config.json, `LayoutError` for a directory that is not empty. Experts that
    the model has as one tensor are taken apart as transformers does it.
    """
    stored = parameters(reader)
    if not (description / "config.json").is_file() or leads_out(description / "config.json"):
        raise NotFoundError(
            f"{description} has no config.json, so nothing says what model this is. Type --config DIR with a directory "
            "of that model."
        )
    _config(description)
    tensors = _named(reader, stored, description)
    sizes = {
        name: place.box.numel * _stored_as(reader, place.tensor, dtype).itemsize for name, place in tensors.items()
    }
    files = _dealt(list(sizes.items()), file_bytes)
    single = len(files) == 1
    names = [
        "model.safetensors" if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for number in range(1, len(files) + 1)
    ]
    with whole_directory(directory) as draft:
        for file, held in zip(names, files, strict=True):
            _write_file(reader, draft / file, {name: tensors[name] for name in held}, dtype)
        if not single:
            where = {name: file for file, held in zip(names, files, strict=True) for name in held}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
            _write(draft / "model.safetensors.index.json", json.dumps(index, indent=2))
        _describe(description, draft, dtype or DTYPES[reader.manifest.tensors[stored[0]].dtype])
    return sum(place.box.numel for place in tensors.values())


def _named(reader: GenerationReader, stored: Sequence[str], description: Path) -> dict[str, HubPlace]:
    """The tensors of the directory by their names there, in the order of them."""
    called = {name: name for name in stored}
    called |= {alias: name for alias, name in reader.manifest.aliases.items() if name in called}
    names = {_bare(name): of for name, of in called.items()}
    shapes = {bare: reader.manifest.tensors[of].shape for bare, of in names.items()}
    try:
        hub = hub_names(description)
        for alias, one in [pair for tie in hub.tied.items() for pair in (tie, tie[::-1])]:
            if one in names and alias not in names:  # which other libraries store under one of its names
                names[alias], shapes[alias] = names[one], shapes[one]
        known = hub.shapes
        if odd := sorted(name for name in shapes.keys() | known.keys() if shapes.get(name) != known.get(name)):
            here, there = (of.get(odd[0], "none") for of in (shapes, known))
            raise MismatchError(f"the shape of {odd[0]} is {here} in the checkpoint and {there} by {description}")
    except MismatchError as error:
        if are_fused(names):
            raise ConfigNeededError(
                f"the model has the experts of a layer as one tensor, which other programs have apart, and {error}"
            ) from error
        logger.warning("tensors are written under the names that they have here: %s", error)
        # Of a tied tensor the name that lies deepest: a head hangs on the model, and what readers look for is the
        # embedding inside of it.
        deepest = {of: max((n for n in names if names[n] == of), key=lambda n: (n.count("."), n)) for of in stored}
        return {bare: whole(of, shapes[bare]) for of, bare in sorted(deepest.items(), key=lambda item: item[1])}
    return {
        name: replace(place, tensor=names[place.tensor])
        for name, place in sorted(hub.places.items())
        if names[place.tensor] != names.get(hub.tied.get(place.tensor, ""))
    }


def export_torch(reader: GenerationReader, file: Path, *, dtype: torch.dtype | None = None) -> int:
    """Write the model's state dict, tied names included, for `torch.load(file, weights_only=True)`.

    torch writes from memory, so this takes the model's. `LayoutError` where the file is there already.
    """
    if file.exists():
        raise LayoutError(f"{file} is there already. Give another name, or remove it.")
    tensors, manifest = parameters(reader), reader.manifest
    state = {_bare(name): _cast(read_whole(reader, name), dtype) for name in tensors}
    for name, stored in manifest.aliases.items():
        if name.startswith((MODEL, BUFFER)) and stored in tensors:
            state[_bare(name)] = state[_bare(stored)]
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        torch.save(state, draft)
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        draft.replace(file)
        sync_directory(file.absolute().parent)
    finally:
        draft.unlink(missing_ok=True)
    return sum(state[_bare(name)].numel() for name in tensors)


def parameters(reader: GenerationReader) -> list[str]:
    """The names under which a generation stores its model, which must be whole, and nothing but a model's."""
    manifest = reader.manifest
    found = sorted(name for name in manifest.tensors if name.startswith((MODEL, BUFFER)))
    if lacking := sorted(name for name in manifest.external if name.startswith(MODEL)):
        raise BaseNeededError(
            f"{manifest.generation} holds what was trained, and names the rest by its hash: "
            f"{first_few([_bare(name) for name in lacking])}"
        )
    # What was imported from a directory that does not tell buffers from parameters is stored as either.
    if not any(name.startswith(MODEL) for name in (*found, *manifest.aliases)):
        raise MismatchError(f"{manifest.generation} holds no model: no tensor's name begins with {MODEL}.")
    return found


def _bare(name: str) -> str:
    return name.removeprefix(MODEL).removeprefix(BUFFER)


def _stored_as(reader: GenerationReader, name: str, dtype: torch.dtype | None) -> torch.dtype:
    own = DTYPES[reader.manifest.tensors[name].dtype]
    return dtype if dtype is not None and own.is_floating_point else own


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _dealt(sizes: Sequence[tuple[str, int]], most: int) -> list[list[str]]:
    """Names in their order into files of at most `most` bytes; a larger one has a file of its own."""
    files: list[list[str]] = [[]]
    room = most
    for name, nbytes in sizes:
        if nbytes > room and files[-1]:
            files.append([])
            room = most
        files[-1].append(name)
        room -= nbytes
    return files


def _write_file(reader: GenerationReader, path: Path, tensors: dict[str, HubPlace], dtype: torch.dtype | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wider ones first, so that every element is aligned; readers go by the header.
    kinds = {name: _stored_as(reader, place.tensor, dtype) for name, place in tensors.items()}
    names = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    position = 0
    for name in names:
        end = position + tensors[name].box.numel * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPE_NAMES[kinds[name]], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)

    def chunks() -> Iterator[Buffer]:
        yield len(text).to_bytes(8, "little") + text
        places = [(tensors[name], reader.manifest.tensors[tensors[name].tensor].itemsize) for name in names]
        parts = ((place.tensor, box) for place, itemsize in places for box in place.parts(itemsize))
        for part in read_each(reader, parts):
            yield tensor_bytes(_cast(part, dtype))

    with open(path, "wb", buffering=0) as file:
        write_behind(file.fileno(), chunks())
        os.fsync(file.fileno())


@contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory beside it, which takes its place when all of it is written, durably."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise LayoutError(f"{directory} is there already and not empty. Give another directory, or remove it.")
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    try:
        yield draft
        sync_directory(draft)
        if directory.exists():
            directory.rmdir()
        draft.rename(directory)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def copy_description(source: Path, target: Path, *, only: Sequence[str] = ("*",)) -> None:
    """Copy what a Hugging Face directory holds beside weights, such as the tokenizer and its template."""
    if source.resolve() == target.resolve():
        return
    for path in source.iterdir():
        if not path.is_file() or any(path.match(pattern) for pattern in WEIGHTS):
            continue
        if not any(path.match(pattern) for pattern in only):
            continue
        if leads_out(path):
            logger.warning("%s is a link to a file elsewhere, and is not copied", path)
            continue
        if path.stat().st_size > DOCUMENT_BYTES:
            logger.warning("%s is too large to describe a model, and is not copied", path)
            continue
        with open(path, "rb") as file, open(target / path.name, "wb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _describe(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy everything but weights, and have config.json say what the weights are."""
    copy_description(source, target)
    config = _config(source)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write(target / "config.json", json.dumps(config, indent=2) + "\n")


def _config(description: Path) -> dict[str, Any]:
    try:
        return read_object(description / "config.json")
    except DamagedError as error:
        raise DamagedError(f"{error}. Type --config DIR with a directory of that model.") from error


def leads_out(path: Path) -> bool:
    """Whether a file of a directory is a link to one outside of it, which the store of the hub's cache is not."""
    home, file = path.parent.resolve(), path.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    return not any(file.is_relative_to(one) for one in homes)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
