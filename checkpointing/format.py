"""The files of a generation: shard file, index, manifest, COMMIT. What they hold and how it is laid out; no I/O.

`docs/format.md` describes the same on one page, with an example; `codec.py` turns manifests and indexes into bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import xxhash

from checkpointing.geometry import Box, Shape, panel_lines, panels

FORMAT = "evershard-checkpoint"
VERSION = 1
MANIFEST, COMMIT, ABANDONED = "manifest.json", "COMMIT", "ABANDONED"

METADATA_BYTES = 256 * 1024 * 1024  # of a manifest, an index or checksums: larger ones are neither written nor read
HEADER_BYTES = 100 * 1000 * 1000  # of a safetensors header, by that format
FEW_WRITERS = 16  # a tensor's writers are named up to so many; those of the others are found by what they cover
COVER_PARTS = 1 << 16  # a cover counts in these parts of a dimension

PAGE = 4096  # shard data starts on a page, so that it can be mapped and written with direct I/O
PACK_BELOW = 64 * 1024  # smaller pieces share one entry per dtype: a header line each would cost more than the data
CHECKSUMS = "@checksums"  # the last entry of every shard file

# The names of dtypes, those of safetensors, with the bytes of an element; `tensors.DTYPES` has torch's own.
ITEM_BYTES = {
    **dict.fromkeys(("F64", "C64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


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


SUM = 8  # bytes of a checksum


def checksums(data: memoryview, block: int) -> bytes:
    """xxh3-64 of every block, 8 bytes each, big-endian, joined."""
    checksum = xxhash.xxh3_64_digest
    return b"".join([checksum(data[i : i + block]) for i in range(0, len(data), block)])


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as its user knows it: dtype (a safetensors name) and global shape; and its writers, if they are few."""

    dtype: str
    shape: Shape
    writers: tuple[int, ...] | None = field(default=None, compare=False)  # ranks, ascending; None: see the covers

    @property
    def itemsize(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A logical tensor whose bytes lie elsewhere: where, and the SHA-256 of its row-major bytes."""

    dtype: str
    shape: Shape
    source: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of a logical tensor at byte `start` of a shard's data: its panels one after the other, each row-major.

    The checksums of their blocks, in the same order, are at byte `sums` of those that end the shard file.
    """

    name: str
    box: Box
    start: int
    sums: int = 0


@dataclass(frozen=True, slots=True)
class Index:
    """One writer's contents: its boxes in the order of the file, the scalars it was elected for, the caller's objects.

    Objects are rank 0's. `checksums` is the digest of the shard's checksums.
    """

    save_id: str
    boxes: list[StoredBox]
    checksums: str
    scalars: dict[str, str]  # the little-endian bytes of 0-dimensional tensors, in hexadecimal
    objects: dict[str, Any] = field(default_factory=dict)


# Of every dimension the range, in parts of `COVER_PARTS`, that a writer's boxes lie in: of those that are not whole
# tensors. Shards of one layout lie alike in all tensors, so this tells a reader whose indexes it need not read.
Cover = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Writer:
    """One writer's files: the sizes in bytes of shard and index, the digests of the shard's header and of the index."""

    rank: int
    shard_bytes: int
    index_bytes: int
    header: str
    index: str
    cover: Cover = ()

    @staticmethod
    def of(record: dict[str, Any]) -> Writer:
        """A writer that came from another process as JSON, which knows no tuples."""
        return Writer(**{**record, "cover": tuple((low, high) for low, high in record["cover"])})

    @property
    def files(self) -> dict[str, int]:
        """The size in bytes of every file that it wrote."""
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
    aliases: dict[str, str] = field(default_factory=dict)  # further names of tensors that are stored once
    external: dict[str, ExternalTensor] = field(default_factory=dict)

    @property
    def generation(self) -> str:
        return generation_name(self.step, self.save_id)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def stored_name(self, name: str) -> str:
        """The name that a tensor is stored under, of one that may be tied to another."""
        return self.aliases.get(name, name)


def cover(boxes: Iterable[tuple[Box, Shape]], *, everything: bool = False) -> Cover:
    """The least range in parts of every dimension that holds all boxes, each given with its tensor's shape.

    Without `everything` boxes that are whole tensors are left out: the tensor names the one writer of such a box.
    """
    ranges: list[list[int]] = []
    for box, shape in set(boxes):  # most tensors of a model are shaped and sharded like others
        if box.numel == 0 or (box.size == shape and not everything):
            continue
        for dim, (offset, size, whole) in enumerate(zip(box.offset, box.size, shape, strict=True)):
            low, high = offset * COVER_PARTS // whole, -(-(offset + size) * COVER_PARTS // whole)
            if dim == len(ranges):
                ranges.append([low, high])
            else:
                ranges[dim][0], ranges[dim][1] = min(ranges[dim][0], low), max(ranges[dim][1], high)
    return tuple((low, high) for low, high in ranges)


def meet(a: Cover, b: Cover) -> bool:
    """Whether two covers have a common part. Dimensions that only one of them has say nothing."""
    return bool(a) and all(low < other and start < high for (low, high), (start, other) in zip(a, b, strict=False))


def is_packed(box: Box, tensor: LogicalTensor) -> bool:
    return box.numel * tensor.itemsize < PACK_BELOW


def panels_of(box: Box, tensor: LogicalTensor) -> list[Box]:
    """How a box is stored: whole where it is packed with others, else cut into panels."""
    return [box] if is_packed(box, tensor) else panels(box, tensor.shape)


def stored_panels(stored: StoredBox, tensor: LogicalTensor, part: Box | None = None) -> Iterator[StoredBox]:
    """The panels of a stored box, each as a stored box of its own; with `part` only those that its columns meet."""
    first, last = (part.offset[-1], part.offset[-1] + part.size[-1]) if part and part.size else (0, 0)
    start, sums = stored.start, stored.sums
    for panel in panels_of(stored.box, tensor):
        nbytes = panel.numel * tensor.itemsize
        if part is None or (panel.offset[-1] < last and first < panel.offset[-1] + panel.size[-1]):
            yield StoredBox(stored.name, panel, start, sums)
        start, sums = start + nbytes, sums + sums_size(nbytes)


def sums_size(nbytes: int) -> int:
    """How many bytes the checksums of so many consecutive bytes have."""
    return SUM * -(-nbytes // block_size(nbytes))


def box_sums_size(box: Box, tensor: LogicalTensor) -> int:
    """How many bytes the checksums of a stored box have: those of all its panels."""
    nbytes = box.numel * tensor.itemsize
    if is_packed(box, tensor) or len(box.size) < 2:
        return sums_size(nbytes)
    column = nbytes // box.size[-1]
    return sum(sums_size(column * (right - left)) for left, right in pairwise(panel_lines(box, tensor.shape)))


def stored_bytes(boxes: Sequence[StoredBox], tensors: Mapping[str, LogicalTensor]) -> tuple[int, int]:
    """How many bytes a shard's boxes have, and their checksums."""
    if not boxes:
        return 0, 0
    last = boxes[-1]
    tensor = tensors[last.name]
    return last.start + last.box.numel * tensor.itemsize, last.sums + box_sums_size(last.box, tensor)


def lay_out(
    boxes: Iterable[tuple[str, Box]], tensors: dict[str, LogicalTensor], save_id: str
) -> tuple[bytes, list[StoredBox]]:
    """Place boxes one after the other in a shard file: its header, and every box with its byte offset in the data.

    Wider dtypes come first, so that every element is aligned without a hole, which safetensors would refuse. Packed
    boxes of a dtype lie together under one entry; of the others every panel has one. The checksums come last.
    """

    def order(item: tuple[str, Box]) -> tuple[int, str, bool, str, Shape]:
        name, box = item
        tensor = tensors[name]
        return (-tensor.itemsize, tensor.dtype, is_packed(box, tensor), name, box.offset)

    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "save_id": save_id}}
    placed, position, sums = [], 0, 0
    for name, box in sorted(boxes, key=order):
        tensor = tensors[name]
        placed.append(StoredBox(name, box, position, sums))
        sums += box_sums_size(box, tensor)
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
    header[CHECKSUMS] = {"dtype": "U8", "shape": [sums], "data_offsets": [position, position + sums]}
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = text.ljust(-(-(len(text) + 8) // PAGE) * PAGE - 8)
    return len(padded).to_bytes(8, "little") + padded, placed


def flaw_of_name(name: str) -> str | None:
    """The flaw that keeps a name from being that of a tensor, if any."""
    if not name or not name.isprintable():
        return f"{name!r} is no name of a tensor: names are printable and not empty"
    return None
