"""Who writes what, and who reads what. Pure functions of layouts and indexes, the same on every rank."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from checkpointing.errors import DamagedError, LayoutError, first_few
from checkpointing.format import (
    FEW_WRITERS,
    Cover,
    Index,
    LogicalTensor,
    Manifest,
    StoredBox,
    cover,
    flaw_of_name,
    meet,
    stored_panels,
)
from checkpointing.geometry import Box, External, Piece, check_tiling, find_hole, intersect
from checkpointing.tensors import DTYPE_NAMES


def split(given: Iterable[Piece | External]) -> tuple[list[Piece], list[External]]:
    """Pieces and externals apart. `LayoutError` for anything else, and for tensors whose memory holds no values."""
    pieces: list[Piece] = []
    external: list[External] = []
    for one in given:
        if isinstance(one, External):
            external.append(one)
        elif not isinstance(one, Piece):
            raise LayoutError(
                f"a {type(one).__name__} is no piece; pieces_of and describe return lists, which are to be joined"
            )
        elif one.tensor.is_meta or one.tensor.layout != torch.strided or one.tensor.is_quantized:
            raise LayoutError(f"{one.name}: a meta, sparse or quantized tensor holds no values that could be stored")
        else:
            pieces.append(one)
    return pieces, external


# One piece of a layout as plain values: name, the name it is tied to on this rank (or its own), dtype, global shape,
# offset, size, whether it is averaged.
Row = tuple[str, str, str, Sequence[int], Sequence[int], Sequence[int], bool]


@contextmanager
def collecting_later() -> Iterator[None]:
    """Planning makes many small objects and no cycles: the garbage collector would walk them, and the heap, in vain."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@collecting_later()
def layout_rows(pieces: Sequence[Piece]) -> list[Row]:
    """One rank's layout as plain values, for the other ranks. Errors here are about this rank's pieces alone."""
    tied = find_tied(pieces)
    names = {piece.name for piece in pieces}
    if not all(names) or not all(map(str.isprintable, names)):  # all at once: there are many, and none is wrong
        raise LayoutError(next(flaw for name in names if (flaw := flaw_of_name(name))))
    try:
        return [
            (p.name, tied.get(p.name, p.name), DTYPE_NAMES[t.dtype], p.global_shape, p.offset, t.shape, p.mean)
            for p, t in ((piece, piece.tensor) for piece in pieces)
        ]
    except KeyError:
        piece = next(piece for piece in pieces if piece.tensor.dtype not in DTYPE_NAMES)
        raise LayoutError(f"{piece.name}: dtype {piece.tensor.dtype} has no safetensors name") from None


def find_tied(pieces: Sequence[Piece]) -> dict[str, str]:
    """Names whose pieces are the very memory of another's: each with the first such name in order of names.

    Pieces without elements have no memory and say nothing.
    """
    addresses = [piece.tensor.data_ptr() for piece in pieces]
    if len(set(addresses)) == len(addresses):  # by far the most common
        return {}
    by_memory: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for piece in pieces:
        if piece.tensor.numel():
            by_memory[(*piece.memory, piece.divisor, piece.mean)].append(piece.name)
    firsts: dict[str, set[str]] = defaultdict(set)
    count: dict[str, int] = defaultdict(int)
    for names in by_memory.values():
        for name in names:
            firsts[name].add(min(names))
            count[name] += 1
    return {
        name: first
        for name, (first, *others) in ((name, sorted(found)) for name, found in firsts.items())
        if first != name and not others and count[first] == count[name]
    }


@dataclass(frozen=True, slots=True)
class Mean:
    """A box that is stored as the mean over its holders, ascending ranks, of which `writer` writes it."""

    name: str
    box: Box
    holders: tuple[int, ...]
    writer: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The plan of a save: all names in ascending order, and the boxes and scalars that one rank writes."""

    tensors: dict[str, LogicalTensor]
    aliases: dict[str, str]
    means: list[Mean]
    boxes: list[tuple[str, Box]]
    scalars: list[str]
    cover: Cover
    shared: frozenset[tuple[str, Box]]  # that this rank holds, and others should hold the same of


@dataclass(frozen=True, slots=True)
class SavePlan:
    """The same for all ranks."""

    tensors: dict[str, LogicalTensor]
    aliases: dict[str, str]
    means: list[Mean]
    boxes: list[list[tuple[str, Box]]]
    scalars: list[list[str]]
    covers: list[Cover]
    shared: list[int]  # a bit for each row of a rank's layout, the first one lowest

    def of(self, rank: int, rows: Sequence[Row] = ()) -> RankPlan:
        """`rows` are the rank's own layout, for what it shares."""
        return RankPlan(
            self.tensors,
            self.aliases,
            self.means,
            self.boxes[rank],
            self.scalars[rank],
            self.covers[rank],
            shared_boxes(rows, self.shared[rank]),
        )


def shared_boxes(rows: Sequence[Row], bits: int) -> frozenset[tuple[str, Box]]:
    """The boxes of a rank's own layout whose bit is set."""
    return frozenset(
        (name, Box(tuple(offset), tuple(size)))
        for number, (name, _, _, _, offset, size, _) in enumerate(rows)
        if bits >> number & 1
    )


Held = dict[str, dict[Box, list[int]]]  # by tensor and box: the ranks that hold it, ascending


def plan_save(
    layouts: Sequence[Sequence[Row]], nodes: Sequence[int] | None = None, few_writers: int = FEW_WRITERS
) -> SavePlan:
    """Merge every rank's layout and elect one writer for every box, balancing the bytes over ranks, then over nodes.

    `nodes` has the number of every rank's node; without it all are on one. Tensors with over `few_writers` leave it to
    the covers to tell them. `LayoutError` if ranks disagree on a tensor, or if their boxes leave a hole or overlap
    without being equal.
    """
    tensors, held, averaged, holders = _merge(layouts)
    shared = [_bits(rows, own) for rows, own in zip(layouts, holders, strict=True)]
    aliases = _aliases(layouts, held)
    for name in aliases:
        del tensors[name], held[name]
    _check_tilings(tensors, held)
    boxes_by_rank, scalars_by_rank = _elect(tensors, held, nodes or [0] * len(layouts))
    writers: dict[str, set[int]] = {name: set() for name in tensors}
    for rank, (boxes_, scalars) in enumerate(zip(boxes_by_rank, scalars_by_rank, strict=True)):
        for name in [name for name, _ in boxes_] + scalars:
            writers[name].add(rank)
    named = {
        name: LogicalTensor(t.dtype, t.shape, tuple(sorted(by)) if len(by) <= few_writers else None)
        for name, t in sorted(tensors.items())
        for by in (writers[name],)
    }
    covers = [cover((box, tensors[name].shape) for name, box in own) for own in boxes_by_rank]
    means = _means(held, averaged, boxes_by_rank, scalars_by_rank)
    return SavePlan(named, dict(sorted(aliases.items())), means, boxes_by_rank, scalars_by_rank, covers, shared)


def _merge(
    layouts: Sequence[Sequence[Row]],
) -> tuple[dict[str, LogicalTensor], Held, set[str], list[list[list[int]]]]:
    """Every tensor, who holds which box of it, which tensors are averaged; and by rank and row who holds that box."""
    holders: list[list[list[int]]] = []
    tensors: dict[str, LogicalTensor] = {}
    averaged: dict[str, bool] = {}
    held: Held = {}
    for rank, rows in enumerate(layouts):
        holders.append([])
        for name, _, dtype, shape, offset, size, mean in rows:
            if (known := tensors.get(name)) is None:
                known = tensors[name] = LogicalTensor(dtype, tuple(shape))
                averaged[name], held[name] = mean, {}
            if known.dtype != dtype or known.shape != tuple(shape):
                raise LayoutError(
                    f"{name}: rank {rank} holds {dtype} {tuple(shape)}, another rank {known.dtype} {known.shape}"
                )
            if averaged[name] != mean:
                raise LayoutError(f"{name}: rank {rank} and another rank disagree on whether it is averaged")
            ranks = held[name].setdefault(Box(tuple(offset), tuple(size)), [])
            if ranks and ranks[-1] == rank:
                raise LayoutError(f"{name}: rank {rank} describes the box at {tuple(offset)} twice")
            ranks.append(rank)
            holders[-1].append(ranks)
    return tensors, held, {name for name, mean in averaged.items() if mean}, holders


def _bits(rows: Sequence[Row], holders: Sequence[Sequence[int]]) -> int:
    """A bit for every row of which others should hold the same."""
    marks = ["1" if len(ranks) > 1 and not row[-1] else "0" for row, ranks in zip(rows, holders, strict=True)]
    return int("".join(reversed(marks)) or "0", 2)


def _check_tilings(tensors: dict[str, LogicalTensor], held: Held) -> None:
    """Raise `LayoutError` that names the first few tensors with a hole or an overlap."""
    wrong = []
    for name, boxes in held.items():
        try:
            check_tiling(name, list(boxes), tensors[name].shape)
        except LayoutError as error:
            wrong.append(str(error))
    if wrong:
        raise LayoutError(wrong[0] if len(wrong) == 1 else f"{len(wrong)} tensors: {first_few(wrong, limit=3)}")


def _aliases(layouts: Sequence[Sequence[Row]], held: Held) -> dict[str, str]:
    """Names that every rank that holds some of them has tied to the same other one, of which there is nothing more."""
    ties: dict[str, set[str]] = defaultdict(set)
    for rows in layouts:
        for name, tied, _, _, _, size, _ in rows:
            if prod(size):
                ties[name].add(tied)
    return {
        name: next(iter(tied))
        for name, tied in ties.items()
        if len(tied) == 1 and name not in tied and ties[first := next(iter(tied))] == tied
        if {box for box in held[name] if box.numel} == {box for box in held[first] if box.numel}
    }


def _means(held: Held, averaged: set[str], boxes: list[list[tuple[str, Box]]], scalars: list[list[str]]) -> list[Mean]:
    """Means, ordered by names and offsets, so that all ranks go through them alike."""
    elected = {(name, box): rank for rank, own in enumerate(boxes) for name, box in own}
    elected |= {(name, Box((), ())): rank for rank, own in enumerate(scalars) for name in own}
    return [
        Mean(name, box, tuple(ranks), elected[name, box])
        for name in sorted(averaged & held.keys())
        for box, ranks in sorted(held[name].items(), key=lambda item: item[0].offset)
        if box.numel and len(ranks) > 1
    ]


def _elect(
    tensors: dict[str, LogicalTensor], holders: Held, nodes: Sequence[int]
) -> tuple[list[list[tuple[str, Box]]], list[list[str]]]:
    """Largest boxes first, each to its least loaded holder on the least loaded node: replicas share the writing."""
    boxes: list[list[tuple[str, Box]]] = [[] for _ in nodes]
    scalars: list[list[str]] = [[] for _ in nodes]
    load = [0] * len(nodes)
    node_load = [0] * (max(nodes) + 1)
    held = [
        (-box.numel * tensors[name].itemsize, name, box.offset, box, ranks)
        for name, by_box in holders.items()
        for box, ranks in by_box.items()
    ]
    held.sort(key=lambda item: item[:3])
    for negative, name, _, box, ranks in held:
        if negative == 0:
            break  # only empty boxes are left
        writer = ranks[0] if len(ranks) == 1 else min(ranks, key=lambda r: (load[r], node_load[nodes[r]], r))
        if tensors[name].shape == ():
            scalars[writer].append(name)
        else:
            boxes[writer].append((name, box))
            load[writer] -= negative
            node_load[nodes[writer]] -= negative
    return boxes, scalars


class Read(NamedTuple):
    """Copy `part` of a logical tensor from a stored panel into a piece."""

    writer: int  # position in the manifest's list of writers
    stored: StoredBox  # the panel alone
    part: Box
    piece: Piece


Stored = dict[str, list[tuple[int, StoredBox]]]  # by tensor: each stored box and the position of its writer


@collecting_later()
def stored_by_name(indexes: Mapping[int, Index]) -> Stored:
    found: Stored = defaultdict(list)
    for writer, index in indexes.items():
        for box in index.boxes:
            found[box.name].append((writer, box))
    return found


def writers_needed(pieces: Iterable[Piece], manifest: Manifest) -> set[int]:
    """Positions of the writers whose indexes a rank must read to find its pieces: all that it needs, and few others."""
    everyone = tuple(writer.rank for writer in manifest.writers)
    position = {rank: i for i, rank in enumerate(everyone)}
    needed: set[int] = set()
    seen: set[tuple[object, ...]] = set()  # tensors that are sharded alike are looked for in the same places
    for piece in pieces:
        tensor = manifest.tensors[piece.name]
        alike = (tensor.writers, tensor.shape, piece.offset, piece.tensor.shape)
        if alike in seen:
            continue
        seen.add(alike)
        # In memory a node has the files of its own ranks alone.
        ranks = everyone if tensor.writers is None else tuple(rank for rank in tensor.writers if rank in position)
        if len(ranks) > 1:  # each has a part of it
            wanted = cover([(piece.box, tensor.shape)], everything=True)
            ranks = tuple(rank for rank in ranks if meet(manifest.writers[position[rank]].cover, wanted))
        needed.update(position[rank] for rank in ranks)
    return needed


@collecting_later()
def plan_load(pieces: Iterable[Piece], stored_boxes: Stored, tensors: Mapping[str, LogicalTensor]) -> list[Read]:
    """The stored boxes that this rank needs. `DamagedError` if they would not fill its pieces exactly once."""
    reads: list[Read] = []
    for piece in pieces:
        if piece.global_shape == ():
            continue  # scalars lie in the index
        box = piece.box
        tensor = tensors[piece.name]
        holders = stored_boxes.get(piece.name, ())
        if same := next((held for held in holders if held[1].box == box), None):  # by far the most common
            writer, stored = same
            reads += [Read(writer, panel, panel.box, piece) for panel in stored_panels(stored, tensor)]
            continue
        found = [
            Read(writer, panel, part, piece)
            for writer, stored in holders
            if intersect(stored.box, box) is not None
            for panel in stored_panels(stored, tensor, box)
            if (part := intersect(panel.box, box)) is not None
        ]
        covered = sum(read.part.numel for read in found)
        if covered != box.numel or (len(found) > 1 and _overlap(found)):
            raise DamagedError(
                f"{piece.name}: the checkpoint holds {covered} of the {box.numel} elements needed at {piece.offset}, "
                "each of which it should hold once"
            )
        reads += found
    return reads


def _overlap(reads: Sequence[Read]) -> bool:
    """Whether parts of a piece overlap; as they add up to it, they would then leave a hole as well."""
    origin, shape = reads[0].piece.offset, reads[0].piece.box.size
    moved = (Box(tuple(o - b for o, b in zip(r.part.offset, origin, strict=True)), r.part.size) for r in reads)
    return find_hole(moved, shape) is not None


CHUNK_BYTES = 16 * 1024 * 1024  # of a stored box, read at a time: bounds the memory of a load
SHORT_BYTES = 64 * 1024  # rows shorter than this are read whole rather than in parts


def windows(stored: Box, part: Box, itemsize: int, limit: int | None = None) -> Iterator[tuple[Box, Box]]:
    """Cut a part of a stored box into (window, part of it): each window is contiguous in the row-major stored box.

    A window holds its part and what lies between: nothing where the part has whole rows, and never more than short
    rows. It has at most `limit` bytes (by default `CHUNK_BYTES`), or one row.
    """
    limit = CHUNK_BYTES if limit is None else limit
    if part == stored and stored.numel * itemsize <= limit:  # by far the most common
        yield stored, part
        return
    depth = 0  # of leading dimensions that are taken one index at a time
    while depth < len(stored.size) - 1:
        row = prod(stored.size[depth + 1 :]) * itemsize
        whole_rows = part.size[depth + 1 :] == stored.size[depth + 1 :]
        if row <= limit and (whole_rows or row < SHORT_BYTES):
            break
        depth += 1
    row = prod(stored.size[depth + 1 :]) * itemsize
    step = max(1, limit // row)
    first, last = part.offset[depth], part.offset[depth] + part.size[depth]
    leading = [range(o, o + n) for o, n in zip(part.offset[:depth], part.size[:depth], strict=True)]
    for index in product(*leading):
        for start in range(first, last, step):
            count = min(step, last - start)
            offset, size = (*index, start), (*(1 for _ in index), count)
            yield (
                Box((*offset, *stored.offset[depth + 1 :]), (*size, *stored.size[depth + 1 :])),
                Box((*offset, *part.offset[depth + 1 :]), (*size, *part.size[depth + 1 :])),
            )


def position_in(stored: Box, window: Box) -> int:
    """The index of a window's first element in the row-major stored box."""
    index = 0
    for at, origin, size in zip(window.offset, stored.offset, stored.size, strict=True):
        index = index * size + at - origin
    return index
