"""Who writes what, and who reads what. Pure functions of layouts and indexes, the same on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from checkpointing.errors import LayoutError, MismatchError, first_few
from checkpointing.format import DTYPE_NAMES, Index, LogicalTensor, StoredBox, stored_panels
from checkpointing.geometry import Box, Piece, check_tiling, find_hole, intersect

Row = tuple[str, str, list[int], list[int], list[int]]  # name, dtype, global shape, offset, size


def layout_rows(pieces: Sequence[Piece]) -> list[Row]:
    """One rank's layout as plain values, for the other ranks. Errors here are about this rank's pieces alone."""
    rows: list[Row] = []
    for piece in pieces:
        if piece.tensor.dtype not in DTYPE_NAMES:
            raise LayoutError(f"{piece.name}: dtype {piece.tensor.dtype} has no safetensors name")
        dtype = DTYPE_NAMES[piece.tensor.dtype]
        rows.append((piece.name, dtype, list(piece.global_shape), list(piece.offset), list(piece.tensor.shape)))
    return rows


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The logical tensors in order of names, and the boxes and scalars that one rank writes."""

    tensors: dict[str, LogicalTensor]
    boxes: list[tuple[str, Box]]
    scalars: list[str]


@dataclass(frozen=True, slots=True)
class SavePlan:
    """The same for all ranks."""

    tensors: dict[str, LogicalTensor]
    boxes: list[list[tuple[str, Box]]]
    scalars: list[list[str]]

    def of(self, rank: int) -> RankPlan:
        return RankPlan(self.tensors, self.boxes[rank], self.scalars[rank])


def plan_save(layouts: Sequence[Sequence[Row]]) -> SavePlan:
    """Merge every rank's layout and elect one writer for every box, balancing the bytes.

    `LayoutError` if ranks disagree on a tensor, or if their boxes leave a hole or overlap without being equal.
    """
    tensors: dict[str, LogicalTensor] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, rows in enumerate(layouts):
        for name, dtype, shape, offset, size in rows:
            whole = tuple(shape)
            if (known := tensors.get(name)) is None:
                known = tensors[name] = LogicalTensor(dtype, whole)
            if (known.dtype, known.shape) != (dtype, whole):
                raise LayoutError(
                    f"{name}: rank {rank} holds {dtype} {whole}, another rank {known.dtype} {known.shape}"
                )
            ranks = holders[name][Box(tuple(offset), tuple(size))]
            if rank in ranks:
                raise LayoutError(f"{name}: rank {rank} describes the box at {tuple(offset)} twice")
            ranks.append(rank)
    for name, boxes in holders.items():
        check_tiling(name, list(boxes), tensors[name].shape)
    boxes_by_rank, scalars_by_rank = _elect(tensors, holders, len(layouts))
    return SavePlan(dict(sorted(tensors.items())), boxes_by_rank, scalars_by_rank)


def _elect(
    tensors: dict[str, LogicalTensor], holders: dict[str, dict[Box, list[int]]], num_ranks: int
) -> tuple[list[list[tuple[str, Box]]], list[list[str]]]:
    """Largest boxes first, each to its least loaded holder, so that replicas share the writing evenly."""
    boxes: list[list[tuple[str, Box]]] = [[] for _ in range(num_ranks)]
    scalars: list[list[str]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    held = [
        (-box.numel * tensors[name].itemsize, name, box.offset, box, ranks)
        for name, by_box in holders.items()
        for box, ranks in by_box.items()
    ]
    held.sort(key=lambda item: item[:3])
    for negative, name, _, box, ranks in held:
        if negative == 0:
            break  # only empty boxes are left
        writer = ranks[0] if len(ranks) == 1 else min(ranks, key=lambda rank: (load[rank], rank))
        if tensors[name].shape == ():
            scalars[writer].append(name)
        else:
            boxes[writer].append((name, box))
            load[writer] -= negative
    return boxes, scalars


@dataclass(frozen=True, slots=True)
class Read:
    """Copy `part` of a logical tensor from a stored panel into a piece."""

    writer: int  # position in the manifest's list of writers
    stored: StoredBox  # the panel alone
    part: Box
    piece: Piece


Stored = dict[str, list[tuple[int, StoredBox]]]  # by tensor: each stored box and the position of its writer


def stored_by_name(indexes: Sequence[Index]) -> Stored:
    found: Stored = defaultdict(list)
    for writer, index in enumerate(indexes):
        for box in index.boxes:
            found[box.name].append((writer, box))
    return found


def plan_load(pieces: Iterable[Piece], stored_boxes: Stored) -> list[Read]:
    """The stored boxes that this rank needs. `MismatchError` if its pieces would not be filled completely."""
    reads: list[Read] = []
    for piece in pieces:
        if piece.global_shape == ():
            continue  # scalars lie in the index
        box = piece.box
        tensor = LogicalTensor(DTYPE_NAMES[piece.tensor.dtype], piece.global_shape)
        found = [
            Read(writer, panel, part, piece)
            for writer, stored in stored_boxes[piece.name]
            if intersect(stored.box, box) is not None
            for panel in stored_panels(stored, tensor, box)
            if (part := intersect(panel.box, box)) is not None
        ]
        if (covered := sum(read.part.numel for read in found)) != box.numel:
            raise MismatchError(
                f"{piece.name}: the checkpoint holds {covered} of the {box.numel} elements needed at {piece.offset}"
            )
        reads += found
    return reads


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


def check_nothing_left(layouts: Sequence[Sequence[Row]], stored: dict[str, LogicalTensor]) -> None:
    """Raise `MismatchError` if all ranks together do not ask for everything that is stored."""
    asked: dict[str, list[Box]] = defaultdict(list)
    for rows in layouts:
        for name, _, _, offset, size in rows:
            asked[name].append(Box(tuple(offset), tuple(size)))
    if left_over := sorted(stored.keys() - asked.keys()):
        raise MismatchError(
            f"the checkpoint holds {len(left_over)} tensors that nothing asks for: {first_few(left_over)}; "
            "pass `only` to load less than everything"
        )
    holes = [(name, hole) for name, boxes in asked.items() if (hole := find_hole(boxes, stored[name].shape))]
    if holes:
        parts = [f"{name} at {hole.offset} of size {hole.size}" for name, hole in holes]
        raise MismatchError(
            f"the checkpoint holds parts of {len(holes)} tensors that nothing asks for: {first_few(parts)}; "
            "pass `only` to load less than everything"
        )


def check_complete(pieces: Sequence[Piece], stored: dict[str, LogicalTensor]) -> None:
    """Raise `MismatchError` if this rank asks for a tensor that the checkpoint lacks or has in another form."""
    missing = sorted({p.name for p in pieces if p.name not in stored})
    if missing:
        raise MismatchError(
            f"the checkpoint does not hold {len(missing)} of the tensors asked for: {first_few(missing)}"
        )
    wrong = []
    for piece in pieces:
        tensor = stored[piece.name]
        dtype = DTYPE_NAMES.get(piece.tensor.dtype, str(piece.tensor.dtype))
        if (tensor.dtype, tensor.shape) != (dtype, piece.global_shape):
            wrong.append(
                f"{piece.name} ({tensor.dtype} {list(tensor.shape)} stored, {dtype} {list(piece.global_shape)} here)"
            )
    if wrong:
        raise MismatchError(f"the checkpoint's tensors are of another shape or dtype: {first_few(sorted(set(wrong)))}")
