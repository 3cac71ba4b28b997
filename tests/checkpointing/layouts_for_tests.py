"""Random logical tensors and random layouts of them over ranks, as pieces of real local tensors."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import torch

from checkpointing import Box, Piece

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64]


@dataclass(frozen=True)
class Logical:
    name: str
    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


def random_tensors(rng: random.Random, count: int) -> list[Logical]:
    """Tensors of 0 to 4 dimensions, some empty, some large enough to be cut into panels."""
    made = []
    for number in range(count):
        kind = rng.choice(["scalar", "small", "small", "large", "empty"])
        if kind == "scalar":
            shape: tuple[int, ...] = ()
        elif kind == "large":
            shape = (rng.randint(150, 300), rng.randint(150, 300))
        else:
            shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 4)))
        if kind == "empty":
            shape = (*shape[:-1], 0)
        dtype = rng.choice(DTYPES)
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        raw = raw % 2 if dtype == torch.bool else raw
        made.append(Logical(f"model/t{number}", raw.view(dtype).reshape(shape)))
    return made


def random_layout(rng: random.Random, tensors: list[Logical], num_ranks: int, *, empty: bool) -> list[list[Piece]]:
    """Each tensor replicated, sharded along one or two dimensions (unevenly), or on one rank; values or zeros."""
    ranks: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for tensor in tensors:
        for rank, boxes in enumerate(_boxes(rng, tuple(tensor.value.shape), num_ranks)):
            for box in boxes:
                part = tensor.value[box.slices((0,) * len(box.offset))].clone()
                local = _strided(torch.zeros_like(part) if empty else part, rng)
                ranks[rank].append(Piece(tensor.name, local, box.offset, tuple(tensor.value.shape)))
    return ranks


def _boxes(rng: random.Random, shape: tuple[int, ...], num_ranks: int) -> list[list[Box]]:
    whole = Box((0,) * len(shape), shape)
    kind = rng.choice(["replicated", "one rank", "sharded", "grid"]) if shape else "replicated"
    if kind == "replicated":
        return [[whole]] * num_ranks
    if kind == "one rank":
        owner = rng.randrange(num_ranks)
        return [[whole] if rank == owner else [] for rank in range(num_ranks)]
    boxes = [whole]
    for dim in rng.sample(range(len(shape)), 1 if kind == "sharded" else min(2, len(shape))):
        boxes = [part for box in boxes for part in _split(rng, box, dim)]
    dealt: list[list[Box]] = [[] for _ in range(num_ranks)]
    for number, box in enumerate(boxes):
        dealt[number % num_ranks].append(box)
    return dealt


def _split(rng: random.Random, box: Box, dim: int) -> list[Box]:
    """Uneven parts, none of them twice the same empty one."""
    cuts = sorted({0, box.size[dim], *(rng.randint(0, box.size[dim]) for _ in range(rng.randint(1, 4)))})
    parts = []
    for start, stop in pairwise(cuts):
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        parts.append(Box(offset, (*box.size[:dim], stop - start, *box.size[dim + 1 :])))
    return parts or [box]


def _strided(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Sometimes a view that is not contiguous."""
    if tensor.dim() < 2 or rng.random() < 0.6:
        return tensor
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def assembled(tensors: list[Logical], layout: list[list[Piece]]) -> dict[str, torch.Tensor]:
    """The logical tensors put together from the pieces of all ranks."""
    result = {t.name: torch.zeros_like(t.value) for t in tensors}
    for pieces in layout:
        for piece in pieces:
            result[piece.name][piece.box.slices((0,) * len(piece.offset))] = piece.tensor
    return result


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.clone().as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy())  # of one element too
