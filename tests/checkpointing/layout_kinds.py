"""Every kind of layout, as pieces of real local tensors over simulated ranks, and one random case of them.

A kind lays one logical tensor out over some ranks: `fill` says whether the local tensors hold its values (to be saved)
or a sentinel (to be loaded into). What lies around the pieces, such as padding, keeps the sentinel.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product
from math import prod

import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from checkpointing import Piece
from checkpointing.geometry import Box
from checkpointing.layouts.dtensor import held_intervals
from checkpointing.tensors import DTYPES
from tests.checkpointing.layouts_for_tests import Logical, bits

ARITHMETIC = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # small integers are exact in all of them


class Hand:
    """Makes the local tensors of one layout and remembers the buffers that they are views of."""

    def __init__(self, rng: random.Random, logical: Logical, num_ranks: int, fill: bool) -> None:
        self.rng, self.logical, self.fill = rng, logical, fill
        self.ranks: list[list[Piece]] = [[] for _ in range(num_ranks)]
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []  # each with where it holds pieces

    def buffer(self, *shape: int) -> torch.Tensor:
        made = sentinel(self.logical.value.dtype, shape)
        self.buffers.append((made, torch.zeros(shape, dtype=torch.bool)))
        return made

    def hold(self, rank: int, local: torch.Tensor, offset: tuple[int, ...], **options: float) -> None:
        """A piece over a view; `drift` is added to what a mean is of."""
        drift = options.pop("drift", 0)
        piece = Piece(self.logical.name, local, offset, self.logical.shape, **options)  # type: ignore[arg-type]
        if self.fill:
            values = self.logical.value[piece.box.slices((0,) * len(offset))]
            changed = piece.divisor != 1 or drift
            local.copy_((values.double() / piece.divisor + drift).to(values.dtype) if changed else values)
        self._mark(local)
        self.ranks[rank].append(piece)

    def hold_all(self, rank: int, pieces: list[Piece]) -> None:
        for piece in pieces:
            self.hold(rank, piece.tensor, piece.offset)

    def own(self, rank: int, box: Box, **options: float) -> None:
        self.hold(rank, self.buffer(*box.size), box.offset, **options)

    def _mark(self, view: torch.Tensor) -> None:
        for made, held in self.buffers:
            if made.untyped_storage().data_ptr() == view.untyped_storage().data_ptr() and made.numel():
                held.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)

    def around_is_untouched(self) -> bool:
        return all(
            bits(made[~held]) == bits(sentinel(made.dtype, (int((~held).sum()),))) for made, held in self.buffers
        )


def sentinel(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    byte = 1 if dtype == torch.bool else 0x5A
    return torch.full((*shape, dtype.itemsize), byte, dtype=torch.uint8).view(dtype).reshape(shape)


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def cut(rng: random.Random, size: int, parts: int) -> list[tuple[int, int]]:
    """Consecutive ranges of any sizes, none of them twice the same empty one."""
    lines = sorted({0, size, *(rng.randint(0, size) for _ in range(parts - 1))})
    return list(pairwise(lines)) or [(0, 0)]


def along(shape: tuple[int, ...], dim: int, start: int, stop: int) -> Box:
    offset, size = [0] * len(shape), list(shape)
    offset[dim], size[dim] = start, stop - start
    return Box(tuple(offset), tuple(size))


def replicated(hand: Hand) -> None:
    for rank in range(len(hand.ranks)):
        hand.own(rank, whole(hand.logical.shape))


def one_rank(hand: Hand) -> None:
    hand.own(hand.rng.randrange(len(hand.ranks)), whole(hand.logical.shape))


def uneven(hand: Hand) -> None:
    """Shards of any sizes along some dimension, in any order; some ranks get none."""
    shape = hand.logical.shape
    dim = hand.rng.randrange(len(shape))
    ranks = hand.rng.sample(range(len(hand.ranks)), len(hand.ranks))
    for rank, (start, stop) in zip(ranks, cut(hand.rng, shape[dim], len(hand.ranks)), strict=False):
        hand.own(rank, along(shape, dim, start, stop))


def chunked(hand: Hand) -> None:
    """As torch.chunk: the last shards are shorter or of size zero, and those are described too."""
    shape = hand.logical.shape
    dim = hand.rng.randrange(len(shape))
    step = -(-shape[dim] // len(hand.ranks))
    for rank in range(len(hand.ranks)):
        start, stop = min(rank * step, shape[dim]), min((rank + 1) * step, shape[dim])
        if start < stop or rank == 0 or (rank - 1) * step < shape[dim]:
            hand.own(rank, along(shape, dim, start, stop))


def grid(hand: Hand) -> None:
    """Cut along every dimension, dealt to the ranks, some of the boxes to two of them."""
    shape = hand.logical.shape
    cuts = [cut(hand.rng, size, 2) for size in shape]
    for number, ranges in enumerate(product(*cuts)):
        box = Box(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))
        holders = {number % len(hand.ranks)} | {hand.rng.randrange(len(hand.ranks)) for _ in range(number % 2)}
        for rank in holders:
            hand.own(rank, box)


def strided(hand: Hand) -> None:
    """FSDP over tensor parallelism in one dimension."""
    shape, size = hand.logical.shape, len(hand.ranks)
    inner = hand.rng.choice([n for n in range(1, size + 1) if size % n == 0])
    dim = hand.rng.randrange(len(shape))
    placements = (_StridedShard(dim, split_factor=inner), Shard(dim))
    for rank in range(size):
        runs = held_intervals(
            [[(0, n)] for n in shape], (size // inner, inner), (rank // inner, rank % inner), placements
        )
        local = hand.buffer(*(sum(length for _, length in held) for held in runs))
        hand.hold_all(rank, Piece.runs(hand.logical.name, local, runs, shape))


def fused(hand: Hand) -> None:
    """A fused query, key and value of any widths: a rank has a share of each, keys and values on several ranks."""
    shape, size = hand.logical.shape, len(hand.ranks)
    sections = cut(hand.rng, shape[0], 3)
    groups = [size, *(hand.rng.choice([n for n in range(1, size + 1) if size % n == 0]) for _ in sections[1:])]
    for rank in range(size):
        runs = []
        for (start, stop), ways in zip(sections, groups, strict=True):
            step, part = -(-(stop - start) // ways), rank * ways // size  # as many ranks share a part as there are more
            left, right = min(start + part * step, stop), min(start + (part + 1) * step, stop)
            runs += [(left, right - left)] if left < right else []
        local = hand.buffer(sum(length for _, length in runs), *shape[1:])
        rest = [[(0, n)] for n in shape[1:]]
        hand.hold_all(rank, Piece.runs(hand.logical.name, local, [runs, *rest], shape))


def interleaved(hand: Hand) -> None:
    """A gate above an up projection, whose rows alternate in the local tensor."""
    shape = hand.logical.shape
    half, odd = divmod(shape[0], 2)
    for rank, (start, stop) in enumerate(cut(hand.rng, half, len(hand.ranks))):
        local = hand.buffer(2 * (stop - start), *shape[1:])
        for number in range(2):
            if stop > start:
                hand.hold(rank, local[number::2], (number * half + start, *(0 for _ in shape[1:])))
    if odd or not half:
        hand.own(0, along(shape, 0, 2 * half, shape[0]))


def deinterleaved(hand: Hand) -> None:
    """Rows that alternate between a gate and an up projection, which lie one after the other in the local tensor."""
    shape = hand.logical.shape
    half, odd = divmod(shape[0], 2)
    for rank, (start, stop) in enumerate(cut(hand.rng, half, len(hand.ranks))):
        local = hand.buffer(2 * (stop - start), *shape[1:])
        for row in range(start, stop):
            for number in range(2):
                view = local[number * (stop - start) + row - start :][:1]
                hand.hold(rank, view, (2 * row + number, *(0 for _ in shape[1:])))
    if odd or not half:
        hand.own(0, along(shape, 0, 2 * half, shape[0]))


def flat(hand: Hand) -> None:
    """ZeRO: equal ranges of the flattening that begin and end inside rows, with padding at the end."""
    shape, size = hand.logical.shape, len(hand.ranks)
    before = hand.rng.randint(0, 3)  # of another tensor in the same partition
    step = -(-(prod(shape) + hand.rng.randint(0, 5)) // size)
    for rank in range(size):
        local = hand.buffer(before + step)[before:]
        hand.hold_all(rank, Piece.flat(hand.logical.name, local, rank * step, shape))


def views(hand: Hand) -> None:
    """Views that are not contiguous: every other element of a larger buffer, transposed."""
    shape = hand.logical.shape
    dim = hand.rng.randrange(len(shape))
    for rank, (start, stop) in enumerate(cut(hand.rng, shape[dim], len(hand.ranks))):
        box = along(shape, dim, start, stop)
        local = hand.buffer(*(2 * n + 1 for n in reversed(box.size)))
        hand.hold(rank, local[(slice(1, None, 2),) * len(shape)].permute(*reversed(range(len(shape)))), box.offset)


def padded(hand: Hand) -> None:
    """A vocabulary padded to some multiple of the ranks and beyond; the padding is nobody's."""
    shape, size = hand.logical.shape, len(hand.ranks)
    step = -(-shape[0] // size) + hand.rng.randint(0, 3)
    for rank in range(size):
        local = hand.buffer(step, *shape[1:])
        runs = [[(rank * step, step)], *([(0, n)] for n in shape[1:])]
        hand.hold_all(rank, Piece.runs(hand.logical.name, local, runs, shape))


def experts(hand: Hand) -> None:
    """A stack by global expert: any rank may have any of them, as a slice of a stack of its own."""
    shape = hand.logical.shape
    local: dict[int, list[int]] = {}
    for expert in range(shape[0]):
        local.setdefault(hand.rng.randrange(len(hand.ranks)), []).append(expert)
    for rank, held in local.items():
        hand.rng.shuffle(held)
        stack = hand.buffer(len(held), *shape[1:])
        for number, expert in enumerate(held):
            hand.hold(rank, stack[number : number + 1], (expert, *(0 for _ in shape[1:])))


def divided(hand: Hand) -> None:
    """Held divided by a power of two, by different ones on different ranks."""
    shape = hand.logical.shape
    boxes = [whole(shape)] if hand.rng.random() < 0.5 or not shape else [
        along(shape, 0, *ends) for ends in cut(hand.rng, shape[0], 2)
    ]  # fmt: skip
    for rank in range(len(hand.ranks)):
        for box in boxes:
            hand.own(rank, box, divisor=hand.rng.choice([1, 2, 4]))


def averaged(hand: Hand) -> None:
    """Replicas that drifted apart around their mean, of the whole or of shards."""
    shape, size = hand.logical.shape, len(hand.ranks)
    groups = hand.rng.choice([n for n in range(1, size + 1) if size % n == 0]) if shape else 1
    boxes = [along(shape, 0, *ends) for ends in cut(hand.rng, shape[0], groups)] if shape else [whole(shape)]
    for number, box in enumerate(boxes):
        holders = range(number, size, len(boxes))
        for place, rank in enumerate(holders):
            hand.own(rank, box, mean=True, drift=2 * place - (len(holders) - 1))


def tied(hand: Hand) -> None:
    """Two names for the same memory; the second is known as `<name>.tied`."""
    (replicated if hand.rng.random() < 0.5 or not hand.logical.shape else chunked)(hand)
    if not prod(hand.logical.shape):
        return  # nothing in memory, so nothing tells that two names are one
    for pieces in hand.ranks:
        pieces += [Piece(f"{p.name}.tied", p.tensor, p.offset, p.global_shape) for p in pieces]


Kind = Callable[[Hand], None]
ANY_SHAPE: list[Kind] = [replicated, one_rank, divided, averaged, tied]
KINDS: list[Kind] = [
    *ANY_SHAPE, uneven, chunked, grid, strided, fused, interleaved, deinterleaved, flat, views, padded, experts
]  # fmt: skip
ARITHMETIC_KINDS = {divided, averaged}
SHAPES = ["scalar", "empty", "vector", "matrix", "prime", "deep", "thin", "large"]


def random_tensor(rng: random.Random, name: str, shape_kind: str, *, arithmetic: bool) -> Logical:
    dtype = rng.choice(ARITHMETIC if arithmetic else list(DTYPES.values()))
    shape = {
        "scalar": lambda: (),
        "empty": lambda: (rng.randint(0, 3), 0, 2)[: rng.randint(2, 3)],
        "vector": lambda: (rng.randint(1, 40),),
        "matrix": lambda: (rng.randint(1, 12), rng.randint(1, 12)),
        "prime": lambda: (rng.choice([7, 13, 23]), rng.choice([3, 5, 11])),
        "deep": lambda: tuple(rng.randint(1, 4) for _ in range(rng.randint(3, 4))),
        "thin": lambda: rng.choice([(1, rng.randint(1, 30)), (rng.randint(1, 30), 1), (1, 1)]),
        "large": lambda: (rng.randint(20, 40), -(-70_000 // dtype.itemsize) // 20 + rng.randint(0, 9)),
    }[shape_kind]()
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    if arithmetic:
        return Logical(name, torch.randint(0, 9, shape, generator=generator).to(dtype) * 8)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return Logical(name, (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape))


def lay_out(rng: random.Random, kind: Kind, logical: Logical, num_ranks: int, *, fill: bool) -> Hand:
    hand = Hand(rng, logical, num_ranks, fill)
    kind(hand)
    if not any(hand.ranks):  # nothing to hold, but a tensor that must be named
        assert not prod(logical.shape)
        hand.own(0, whole(logical.shape))
    return hand


def holds(hand: Hand) -> bool:
    """Whether every piece has the logical tensor's values, to the bit, and nothing around them was touched."""
    value = hand.logical.value
    for piece in (piece for pieces in hand.ranks for piece in pieces):
        part = value[piece.box.slices((0,) * len(piece.offset))]
        expected = part if piece.divisor == 1 else (part.double() / piece.divisor).to(part.dtype)
        if bits(piece.tensor) != bits(expected):
            return False
    return hand.around_is_untouched()
