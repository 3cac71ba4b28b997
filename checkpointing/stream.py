"""The tensors of a generation part by part, however they were sharded, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import torch

from checkpointing.geometry import Box, Piece
from checkpointing.reader import GenerationReader
from checkpointing.tensors import DTYPES

PART_BYTES = 64 * 1024 * 1024
TOGETHER_BYTES = 16 * 1024 * 1024  # of small tensors that are read at a time: more would leave the processor's cache


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
    (tensor,) = read_each(reader, [(name, box)])
    return tensor


def read_each(reader: GenerationReader, wanted: Iterable[tuple[str, Box]]) -> Iterator[torch.Tensor]:
    """One box after the other; small ones are read together, up to `TOGETHER_BYTES`."""
    pieces: list[Piece] = []
    nbytes = 0
    for name, box in wanted:
        about = reader.manifest.tensors[name]
        if pieces and nbytes + box.numel * about.itemsize > TOGETHER_BYTES:
            reader.load(pieces)
            yield from (piece.tensor for piece in pieces)
            pieces, nbytes = [], 0
        pieces.append(Piece(name, torch.empty(box.size, dtype=DTYPES[about.dtype]), box.offset, about.shape))
        nbytes += box.numel * about.itemsize
    if pieces:
        reader.load(pieces)
        yield from (piece.tensor for piece in pieces)


def read_whole(reader: GenerationReader, name: str) -> torch.Tensor:
    """All of a tensor that is stored under this name."""
    shape = reader.manifest.tensors[name].shape
    return read(reader, name, Box((0,) * len(shape), shape))
