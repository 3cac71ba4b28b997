"""The tensors of a generation part by part, however they were sharded, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from checkpointing.format import DTYPES
from checkpointing.geometry import Box, Piece
from checkpointing.reader import GenerationReader

PART_BYTES = 64 * 1024 * 1024


def boxes(shape: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """A tensor in boxes of whole leading rows, of about `PART_BYTES`: one after the other they are its bytes."""
    if not shape or 0 in shape:
        yield Box((0,) * len(shape), shape)
        return
    rows = max(1, PART_BYTES // (prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], rows):
        yield Box((start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:]))


def read(reader: GenerationReader, name: str, box: Box) -> torch.Tensor:
    """A box of a tensor that is stored under this name, its checksums verified."""
    tensor = reader.manifest.tensors[name]
    piece = Piece(name, torch.empty(box.size, dtype=DTYPES[tensor.dtype]), box.offset, tensor.shape)
    reader.load([piece])
    return piece.tensor


def read_whole(reader: GenerationReader, name: str) -> torch.Tensor:
    """All of a tensor that is stored under this name."""
    shape = reader.manifest.tensors[name].shape
    return read(reader, name, Box((0,) * len(shape), shape))
