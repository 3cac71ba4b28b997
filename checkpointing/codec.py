"""Manifests and indexes as bytes, and back: whatever the bytes are, what they mean or one of our errors.

Nothing here executes or follows what it reads; sizes and counts are checked before anything relies on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from math import isfinite, prod
from typing import Any, NoReturn

from checkpointing.errors import DamagedError, VersionError
from checkpointing.format import (
    FORMAT,
    ITEM_BYTES,
    VERSION,
    ExternalTensor,
    Index,
    LogicalTensor,
    Manifest,
    StoredBox,
    Writer,
    box_sums_size,
    flaw_of_name,
)
from checkpointing.geometry import Box, Shape


def encode_index(index: Index, names: Collection[str]) -> bytes:
    """Columns rather than rows: a tensor is the position of its name in `names`, the manifest's in ascending order.

    Many tensors are sharded alike, so the ranges that boxes have are told once.
    """
    position = {name: i for i, name in enumerate(names)}
    ranges: dict[Box, int] = {}
    range_of = [ranges.setdefault(stored.box, len(ranges)) for stored in index.boxes]
    return _dump(
        {
            "format": FORMAT,
            "version": VERSION,
            "save_id": index.save_id,
            "boxes": {
                "tensor": [position[b.name] for b in index.boxes],
                "range": range_of,
            },
            "ranges": [(box.offset, box.size) for box in ranges],
            "checksums": index.checksums,
            "scalars": index.scalars,
            "objects": index.objects,
        }
    )


def decode_index(data: bytes, manifest: Manifest, source: str) -> Index:
    """`DamagedError` unless this is an index of that generation, and every box lies in its tensor."""
    try:
        raw = _load(data, source, ("save_id", "boxes", "ranges", "checksums", "scalars", "objects"))
        if raw["save_id"] != manifest.save_id:
            raise DamagedError(f"{source} belongs to save {raw['save_id']!r}, not to {manifest.save_id}")
        boxes = _decode_boxes(raw["boxes"], [_range(given) for given in _list(raw["ranges"])], manifest.tensors)
        scalars = {name: _text(value) for name, value in _table(raw["scalars"]).items()}
        for name, value in scalars.items():
            tensor = manifest.tensors[name]
            if tensor.shape != () or not re.fullmatch(rf"[0-9a-f]{{{2 * tensor.itemsize}}}", value):
                raise ValueError(f"{name} is no scalar of its dtype")
        return Index(manifest.save_id, boxes, _hex(raw["checksums"], 32), scalars, _table(raw["objects"]))
    except (KeyError, ValueError) as error:
        raise DamagedError(f"{source} is not an index of format version {VERSION}: {error!r}") from None


def _decode_boxes(raw: Any, ranges: Sequence[Box], tensors: Mapping[str, LogicalTensor]) -> list[StoredBox]:
    columns = _table(raw, ("tensor", "range"))
    names = list(tensors)
    sizes: dict[tuple[Box, Shape, str], tuple[int, int]] = {}  # of data and checksums: most boxes are like others
    boxes, start, sums = [], 0, 0
    for number, which in zip(_list(columns["tensor"]), _list(columns["range"]), strict=True):
        name = names[_whole(number, below=len(names))]
        box, tensor = ranges[_whole(which, below=len(ranges))], tensors[name]
        alike = (box, tensor.shape, tensor.dtype)
        if alike not in sizes:
            if not box.within(tensor.shape) or box.numel == 0 or tensor.shape == ():
                raise ValueError(f"a box of {name} does not lie in it")
            sizes[alike] = box.numel * tensor.itemsize, box_sums_size(box, tensor)
        boxes.append(StoredBox(name, box, start, sums))
        start, sums = start + sizes[alike][0], sums + sizes[alike][1]
    return boxes


def encode_manifest(manifest: Manifest) -> bytes:
    return _dump({"format": FORMAT, "version": VERSION, **asdict(manifest)})


def decode_manifest(data: bytes, source: str) -> Manifest:
    """`DamagedError` unless every field is there, of its type and consistent with the others."""
    try:
        raw = _load(data, source, tuple(Manifest.__dataclass_fields__))
        world_size = _whole(raw["world_size"])
        writers = [_decode_writer(w, world_size) for w in _list(raw["writers"])]
        ranks = [w.rank for w in writers]
        if ranks != sorted(set(ranks)) or not ranks:
            raise ValueError("the writers are not ascending ranks")
        tensors = {  # indexes count the names in ascending order
            _name(name): _decode_tensor(t, world_size) for name, t in sorted(_table(raw["tensors"]).items())
        }
        aliases = {_name(name): _text(of) for name, of in _table(raw["aliases"]).items()}
        external = {_name(name): _decode_external(t) for name, t in _table(raw["external"]).items()}
        if not set(aliases.values()) <= tensors.keys():
            raise ValueError("an alias is of no tensor")
        if len(tensors.keys() | aliases.keys() | external.keys()) < len(tensors) + len(aliases) + len(external):
            raise ValueError("a name stands for two things")
        return Manifest(
            step=_whole(raw["step"]),
            save_id=_hex(raw["save_id"], 32),
            parent=_text(raw["parent"]),
            run_id=_text(raw["run_id"]),
            incarnation=_whole(raw["incarnation"]),
            serial=_whole(raw["serial"]),
            created=_number(raw["created"]),
            world_size=world_size,
            versions={k: _text(v) for k, v in _table(raw["versions"]).items()},
            metrics={k: _number(v) for k, v in _table(raw["metrics"]).items()},
            writers=writers,
            tensors=tensors,
            aliases=aliases,
            external=external,
        )
    except (KeyError, ValueError) as error:
        raise DamagedError(f"{source} is not a manifest of format version {VERSION}: {error!r}") from None


def _decode_writer(raw: Any, world_size: int) -> Writer:
    w = _table(raw, tuple(Writer.__dataclass_fields__))
    ranges = [_shape(pair) for pair in _list(w["cover"])]
    if any(len(pair) != 2 for pair in ranges):
        raise ValueError("a cover is no ranges")
    return Writer(
        rank=_whole(w["rank"], below=world_size),
        shard_bytes=_whole(w["shard_bytes"]),
        index_bytes=_whole(w["index_bytes"]),
        header=_hex(w["header"], 32),
        index=_hex(w["index"], 32),
        cover=tuple((low, high) for low, high in ranges),
    )


def _decode_tensor(raw: Any, world_size: int) -> LogicalTensor:
    t = _table(raw, ("dtype", "shape", "writers"))
    writers = None if t["writers"] is None else tuple(_whole(rank, below=world_size) for rank in _list(t["writers"]))
    return LogicalTensor(_dtype(t["dtype"]), _global_shape(t["shape"]), writers)


def _decode_external(raw: Any) -> ExternalTensor:
    t = _table(raw, ("dtype", "shape", "source", "sha256"))
    return ExternalTensor(_dtype(t["dtype"]), _global_shape(t["shape"]), _text(t["source"]), _hex(t["sha256"], 64))


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _load(data: bytes, source: str, keys: Collection[str]) -> dict[str, Any]:
    """A JSON object of this format and version with just these keys. Numbers are finite and no key comes twice."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if isfinite(number) else refuse(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        return found if len(found) == len(pairs) else refuse("a key that comes twice")

    try:
        raw = json.loads(data, parse_constant=refuse, parse_float=finite, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{source} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DamagedError(f"{source} is not part of a checkpoint of this format")
    if type(raw.get("version")) is not int or raw["version"] != VERSION:
        raise VersionError(
            f"{source} has format version {raw.get('version')}, and this library reads version {VERSION}: "
            "read it with the release that wrote it, or a newer one"
        )
    return _table(raw, ("format", "version", *keys))


# What follows takes a value of any JSON type, and gives it back as the type it should have or raises `ValueError`.

_LARGEST = 2**63 - 1  # of a size, an offset or a count, in elements or bytes
_MOST_DIMS = 64  # of a torch tensor


def _table(value: Any, keys: Collection[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or (keys is not None and value.keys() != set(keys)):
        raise ValueError("an object was expected" if keys is None else f"an object of {', '.join(keys)} was expected")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("an array was expected")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string was expected")
    return value


def _hex(value: Any, digits: int) -> str:
    if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", _text(value)):
        raise ValueError(f"{digits} hexadecimal digits were expected")
    return str(value)


def _whole(value: Any, below: int = _LARGEST) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise ValueError(f"a whole number below {below} was expected")
    return value


def _number(value: Any) -> float:
    if type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    if type(value) is not float:
        raise ValueError("a number was expected")
    return value  # finite: the parser refuses others


def _shape(value: Any) -> Shape:
    return tuple(_whole(n) for n in _list(value))


def _range(value: Any) -> Box:
    offset, size = _list(value)
    return Box(_shape(offset), _shape(size))


def _global_shape(value: Any) -> Shape:
    """A shape whose bytes can be counted: the dimensions that are not 0, so that strides can be too."""
    shape = _shape(value)
    if len(shape) > _MOST_DIMS or prod(n for n in shape if n) > _LARGEST // 8:
        raise ValueError("a shape is larger than any tensor")
    return shape


def _dtype(value: Any) -> str:
    if _text(value) not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {value!r}")
    return str(value)


def _name(value: str) -> str:
    if flaw := flaw_of_name(value):
        raise ValueError(flaw)
    return value
