"""The files of a generation: shard file, index, manifest, COMMIT. Encoding and strict decoding; no I/O.

`docs/format.md` describes the same on one page, with an example.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import isfinite, prod
from typing import Any, NoReturn

import torch
import xxhash

from checkpointing.errors import DamagedError, VersionError
from checkpointing.geometry import Box, Shape, panel_lines, panels

FORMAT = "evershard-checkpoint"
VERSION = 1
MANIFEST, COMMIT, ABANDONED = "manifest.json", "COMMIT", "ABANDONED"

PAGE = 4096  # shard data starts on a page, so that it can be mapped and written with direct I/O
PACK_BELOW = 64 * 1024  # smaller pieces share one entry per dtype: a header line each would cost more than the data

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def index_name(rank: int) -> str:
    return f"index-{rank:05d}.json"


def generation_name(step: int, save_id: str) -> str:
    return f"step-{step:08d}-{save_id[:8]}"


def digest(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def block_size(nbytes: int) -> int:
    """How many bytes of a stored box share a checksum: a 64th of it, in pages, between 4 KiB and 256 KiB."""
    return min(max(-(-nbytes // 64 // PAGE) * PAGE, PAGE), 64 * PAGE)


def checksums(data: memoryview, block: int) -> str:
    """xxh3-64 of every block, 16 hexadecimal digits each, joined."""
    hexdigest = xxhash.xxh3_64_hexdigest
    return "".join([hexdigest(data[i : i + block]) for i in range(0, len(data), block)])


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """What a user knows of a tensor: dtype (a safetensors name) and global shape."""

    dtype: str
    shape: Shape

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of a logical tensor at byte `start` of a shard's data: its panels one after the other, each row-major.

    `checksums` are those of the blocks of all its panels.
    """

    name: str
    box: Box
    start: int
    checksums: str = ""


@dataclass(frozen=True, slots=True)
class Index:
    """What one writer wrote: its boxes, the scalars it was elected for, and (rank 0) the caller's objects."""

    save_id: str
    boxes: list[StoredBox]
    scalars: dict[str, str]  # the little-endian bytes of 0-dimensional tensors, in hexadecimal
    objects: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Writer:
    """One writer's files: the sizes in bytes of shard and index, the digests of the shard's header and of the index."""

    rank: int
    shard_bytes: int
    index_bytes: int
    header: str
    index: str

    @property
    def files(self) -> dict[str, int]:
        """What it wrote: the size in bytes of every file."""
        return {shard_name(self.rank): self.shard_bytes, index_name(self.rank): self.index_bytes}


@dataclass(frozen=True, slots=True)
class Manifest:
    step: int
    save_id: str
    parent: str  # save id of the generation that was newest when this one was saved; empty for the first
    run_id: str
    incarnation: int
    serial: int  # greater than that of every generation that was there before
    created: float  # seconds since the epoch
    world_size: int
    versions: dict[str, str]
    metrics: dict[str, float]  # of that step, to tell the best generations by
    writers: list[Writer]
    tensors: dict[str, LogicalTensor]

    @property
    def generation(self) -> str:
        return generation_name(self.step, self.save_id)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_packed(box: Box, tensor: LogicalTensor) -> bool:
    return box.numel * tensor.itemsize < PACK_BELOW


def panels_of(box: Box, tensor: LogicalTensor) -> list[Box]:
    """How a box is stored: whole where it is packed with others, else cut into panels."""
    return [box] if is_packed(box, tensor) else panels(box, tensor.shape)


def stored_panels(stored: StoredBox, tensor: LogicalTensor, part: Box | None = None) -> Iterator[StoredBox]:
    """The panels of a stored box, each as a stored box of its own; with `part` only those that its columns meet."""
    first, last = (part.offset[-1], part.offset[-1] + part.size[-1]) if part and part.size else (0, 0)
    start, at = stored.start, 0
    for panel in panels_of(stored.box, tensor):
        nbytes = panel.numel * tensor.itemsize
        digits = num_digits(nbytes)
        if part is None or (panel.offset[-1] < last and first < panel.offset[-1] + panel.size[-1]):
            yield StoredBox(stored.name, panel, start, stored.checksums[at : at + digits])
        start, at = start + nbytes, at + digits


def num_digits(nbytes: int) -> int:
    """How many hexadecimal digits the checksums of so many consecutive bytes have."""
    return 16 * -(-nbytes // block_size(nbytes))


def lay_out(
    boxes: Iterable[tuple[str, Box]], tensors: dict[str, LogicalTensor], save_id: str
) -> tuple[bytes, list[StoredBox]]:
    """Place boxes one after the other in a shard file: its header, and every box with its byte offset in the data.

    Wider dtypes come first, so that every element is aligned without a hole, which safetensors would refuse. Packed
    boxes of a dtype lie together under one entry; of the others every panel has one.
    """

    def order(item: tuple[str, Box]) -> tuple[int, str, bool, str, Shape]:
        name, box = item
        tensor = tensors[name]
        return (-tensor.itemsize, tensor.dtype, is_packed(box, tensor), name, box.offset)

    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "save_id": save_id}}
    placed, position = [], 0
    for name, box in sorted(boxes, key=order):
        tensor = tensors[name]
        placed.append(StoredBox(name, box, position))
        if is_packed(box, tensor):
            end = position + box.numel * tensor.itemsize
            entry = header.setdefault(
                f"@packed-{tensor.dtype}",
                {"dtype": tensor.dtype, "shape": [0], "data_offsets": [position, position]},
            )
            entry["shape"][0] += box.numel
            entry["data_offsets"][1] = end
            position = end
            continue
        for panel in panels(box, tensor.shape):
            key = f"{name}@{','.join(map(str, panel.offset))}"
            end = position + panel.numel * tensor.itemsize
            header[key] = {"dtype": tensor.dtype, "shape": panel.size, "data_offsets": [position, end]}
            position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text.ljust(-(-(len(text) + 8) // PAGE) * PAGE - 8)
    return len(padded).to_bytes(8, "little") + padded, placed


def encode_index(index: Index, names: Sequence[str]) -> bytes:
    """Columns rather than rows: a tensor is the position of its name in `names`, the manifest's order."""
    position = {name: i for i, name in enumerate(names)}
    return _dump(
        {
            "format": FORMAT,
            "version": VERSION,
            "save_id": index.save_id,
            "boxes": {
                "tensor": [position[b.name] for b in index.boxes],
                "offset": [b.box.offset for b in index.boxes],
                "size": [b.box.size for b in index.boxes],
                "start": [b.start for b in index.boxes],
                "checksums": [b.checksums for b in index.boxes],
            },
            "scalars": index.scalars,
            "objects": index.objects,
        }
    )


def decode_index(data: bytes, manifest: Manifest, source: str) -> Index:
    raw = _load(data, source)
    names = list(manifest.tensors)
    try:
        columns = raw["boxes"]
        boxes = [
            StoredBox(names[tensor], Box(tuple(offset), tuple(size)), start, sums)
            for tensor, offset, size, start, sums in zip(
                *(columns[key] for key in ("tensor", "offset", "size", "start", "checksums")), strict=True
            )
        ]
        index = Index(str(raw["save_id"]), boxes, dict(raw["scalars"]), dict(raw["objects"]))
        for stored in boxes:
            _check_stored(stored, manifest.tensors[stored.name])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DamagedError(f"{source} is not an index of format version {VERSION}: {error!r}") from None
    if index.save_id != manifest.save_id:
        raise DamagedError(f"{source} belongs to save {index.save_id}, not to {manifest.save_id}")
    return index


def _check_stored(stored: StoredBox, tensor: LogicalTensor) -> None:
    box = stored.box
    if not box.within(tensor.shape) or box.numel == 0 or stored.start < 0:
        raise ValueError(f"a box of {stored.name} does not lie in it")
    nbytes = box.numel * tensor.itemsize
    if is_packed(box, tensor) or len(box.size) < 2:
        digits = num_digits(nbytes)
    else:
        column = nbytes // box.size[-1]
        digits = sum(num_digits(column * (right - left)) for left, right in pairwise(panel_lines(box, tensor.shape)))
    if len(stored.checksums) != digits:
        raise ValueError(f"a box of {stored.name} has checksums for another size")


def encode_manifest(manifest: Manifest) -> bytes:
    columns = asdict(manifest)
    return _dump({"format": FORMAT, "version": VERSION, **columns})


def decode_manifest(data: bytes, source: str) -> Manifest:
    raw = _load(data, source)
    try:
        tensors = {
            str(name): LogicalTensor(str(t["dtype"]), tuple(int(n) for n in t["shape"]))
            for name, t in sorted(raw["tensors"].items())  # indexes count the names in ascending order
        }
        if unknown := {t.dtype for t in tensors.values()} - DTYPES.keys():
            raise ValueError(f"unknown dtypes {sorted(unknown)}")
        return Manifest(
            step=int(raw["step"]),
            save_id=str(raw["save_id"]),
            parent=str(raw["parent"]),
            run_id=str(raw["run_id"]),
            incarnation=int(raw["incarnation"]),
            serial=int(raw["serial"]),
            created=float(raw["created"]),
            world_size=int(raw["world_size"]),
            versions={str(k): str(v) for k, v in raw["versions"].items()},
            metrics={str(k): _finite_number(v) for k, v in raw["metrics"].items()},
            writers=[
                Writer(int(w["rank"]), int(w["shard_bytes"]), int(w["index_bytes"]), str(w["header"]), str(w["index"]))
                for w in raw["writers"]
            ],
            tensors=tensors,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{source} is not a manifest of format version {VERSION}: {error!r}") from None


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _load(data: bytes, source: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if isfinite(number) else refuse(text)

    try:
        raw = json.loads(data, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{source} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DamagedError(f"{source} is not part of a checkpoint of this format")
    if raw.get("version") != VERSION:
        raise VersionError(
            f"{source} has format version {raw.get('version')}, and this library reads version {VERSION}: "
            "read it with the release that wrote it, or a newer one"
        )
    return raw


def _finite_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor, on the CPU; a copy only where the tensor is elsewhere or not contiguous."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # arrays are buffers


def tensor_over(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A one-dimensional tensor over bytes, without a copy."""
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)


def scalar_hex(tensor: torch.Tensor) -> str:
    return tensor_bytes(tensor.reshape(1)).hex()


def scalar_from_hex(text: str, dtype: torch.dtype, source: str) -> torch.Tensor:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != dtype.itemsize:
        raise DamagedError(f"{source} is not a scalar of {dtype}")
    return torch.frombuffer(bytearray(data), dtype=dtype)[0]
