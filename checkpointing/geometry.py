"""Boxes and pieces: where local tensors lie in logical ones. Data and pure functions; no I/O, no processes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from math import isfinite, prod
from operator import index
from typing import TYPE_CHECKING, NamedTuple

from checkpointing.errors import LayoutError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Interval = tuple[int, int]  # start and length, in elements of one dimension

# The grid that stored pieces are cut on along their last dimension. Sixteen makes column shards of 2, 4, 8 and 16
# ways start on a cut, so that a reader of columns does not read its neighbours' columns too.
COLUMN_GRID = 16


@dataclass(frozen=True, slots=True)
class Box:
    """An n-dimensional range of a logical tensor, in elements."""

    offset: Shape
    size: Shape

    @property
    def numel(self) -> int:
        return prod(self.size)

    def within(self, shape: Shape) -> bool:
        return len(self.offset) == len(self.size) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offset, self.size, shape, strict=True)
        )

    def slices(self, origin: Shape) -> tuple[slice, ...]:
        """This box as an index into a tensor whose first element lies at `origin`."""
        return tuple(slice(o - b, o - b + s) for o, s, b in zip(self.offset, self.size, origin, strict=True))


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes of one tensor, or None where there is none."""
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    ends = (min(x + s, y + t) for x, s, y, t in zip(a.offset, a.size, b.offset, b.size, strict=True))
    size = tuple(end - start for start, end in zip(offset, ends, strict=True))
    return Box(offset, size) if all(s > 0 for s in size) else None


def flat_boxes(start: int, stop: int, shape: Shape) -> list[tuple[Box, int]]:
    """The boxes that elements start to stop of a row-major tensor form, each with the index of its first element."""
    if start >= stop:
        return []
    if not shape:
        return [(Box((), ()), 0)]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows in between
    if first > last:  # inside one row
        return _within_row(last, start, stop, shape)
    found = _within_row(first - 1, start, first * row, shape)
    if first < last:
        found.append((Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])), first * row))
    return found + _within_row(last, last * row, stop, shape)


def _within_row(row: int, start: int, stop: int, shape: Shape) -> list[tuple[Box, int]]:
    base = row * prod(shape[1:])
    inner = flat_boxes(start - base, stop - base, shape[1:])
    return [(Box((row, *box.offset), (1, *box.size)), base + first) for box, first in inner]


def panels(box: Box, shape: Shape) -> list[Box]:
    """Cut a box along the last dimension on the tensor's global grid of `COLUMN_GRID`, in order of columns.

    Vectors are not cut: a range of a vector is contiguous as it stands.
    """
    if len(shape) < 2 or box.numel == 0:
        return [box]
    return [
        Box((*box.offset[:-1], left), (*box.size[:-1], right - left))
        for left, right in pairwise(panel_lines(box, shape))
    ]


def panel_lines(box: Box, shape: Shape) -> list[int]:
    """Where the panels of a box that is not empty begin along the last dimension, and where the last one ends."""
    step = -(-shape[-1] // COLUMN_GRID)
    start, stop = box.offset[-1], box.offset[-1] + box.size[-1]
    return [start, *range((start // step + 1) * step, stop, step), stop]


def check_tiling(name: str, boxes: Sequence[Box], shape: Shape) -> None:
    """Raise `LayoutError` unless the boxes cover the tensor exactly once.

    Boxes are disjoint and their sizes add up to the whole: together that is exact cover.
    """
    for box in boxes:
        if not box.within(shape):
            raise LayoutError(f"{name}: box at {box.offset} of size {box.size} leaves the tensor of shape {shape}")
    # Sorted along the dimension that is cut most, only boxes that start before this one ends can meet it.
    cuts = [len({b.offset[d] for b in boxes}) for d in range(len(shape))]
    most = cuts.index(max(cuts)) if shape else 0
    ordered = sorted((b for b in boxes if b.numel), key=lambda b: b.offset[most : most + 1])
    for i, box in enumerate(ordered):
        for other in ordered[i + 1 :]:
            if shape and other.offset[most] >= box.offset[most] + box.size[most]:
                break
            if (common := intersect(box, other)) is not None:
                raise LayoutError(
                    f"{name}: two different boxes both hold the elements at {common.offset} of size {common.size}; "
                    "only equal boxes may be held twice"
                )
    covered = sum(b.numel for b in ordered)
    if covered != prod(shape):
        hole = find_hole(ordered, shape)
        where = f", such as those at {hole.offset} of size {hole.size}" if hole else ""
        raise LayoutError(f"{name}: {prod(shape) - covered} of {prod(shape)} elements are held by no rank{where}")


def find_hole(boxes: Iterable[Box], shape: Shape) -> Box | None:
    """A part of a tensor that none of the boxes holds, or None. They may overlap."""
    distinct = {box for box in boxes if box.numel}
    if 0 in shape or Box((0,) * len(shape), shape) in distinct:
        return None
    return _hole(distinct, shape, ())


def _hole(boxes: Collection[Box], shape: Shape, strip: tuple[tuple[int, int], ...]) -> Box | None:
    """A hole in a strip of the leading dimensions that all the boxes span, by strips of the next dimension.

    Boxes come and go from one strip to the next, so that each is looked at once where they lie side by side.
    """
    dim = len(strip)
    if dim == len(shape):
        hole = Box(tuple(start for start, _ in strip), tuple(stop - start for start, stop in strip))
        return None if boxes else hole
    starting, ending = defaultdict(list), defaultdict(list)
    for box in boxes:
        starting[box.offset[dim]].append(box)
        ending[box.offset[dim] + box.size[dim]].append(box)
    spanning: set[Box] = set()
    for left, right in pairwise(sorted({0, shape[dim], *starting, *ending})):
        spanning.difference_update(ending[left])
        spanning.update(starting[left])
        if (found := _hole(spanning, shape, (*strip, (left, right)))) is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor and the local tensor (or view) that holds it.

    `offset` and `global_shape` count elements of the logical tensor, without padding; the box has the size of
    `tensor`. The tensor may live on any device and need not be contiguous.

    With a `divisor` the local tensor holds the logical one divided by it, such as a bias that tensor-parallel ranks
    add up: powers of two lose nothing within the range of the dtype, others may round the last bit at each load and
    save; a value that leaves the range is refused when it is saved. With `mean` the logical
    tensor is the mean over all ranks that hold the box, such as replicas that drifted apart between two averagings; a
    load gives all of them the mean. Both are for floating-point tensors.

    A `volatile` tensor may change at any time, as buffers do in a forward; others change only between a backward and
    the next forward, so that a snapshot may copy them meanwhile.
    """

    name: str
    tensor: torch.Tensor
    offset: Shape
    global_shape: Shape
    divisor: float = 1
    mean: bool = False
    volatile: bool = False

    def __post_init__(self) -> None:
        import torch  # here, where there is a tensor: commands that only list generations do without it

        if not isinstance(self.name, str):
            raise LayoutError(f"{self.name!r} is no name of a tensor: names are strings")
        for name in ("offset", "global_shape"):  # numpy's integers and lists are welcome
            object.__setattr__(self, name, _whole_numbers(self.name, getattr(self, name)))
        # By exact type: a DTensor parameter is an instance of Parameter too, and so is FSDP1's flat one.
        if type(self.tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise LayoutError(
                f"{self.name}: a piece holds a plain local tensor, not a {type(self.tensor).__name__}; "
                "pieces_of(name, tensor) describes DTensors"
            )
        if not self.box.within(self.global_shape):
            raise LayoutError(
                f"{self.name}: a local tensor of shape {tuple(self.tensor.shape)} at {self.offset} "
                f"does not lie in a tensor of shape {self.global_shape}"
            )
        if (self.divisor != 1 or self.mean) and not self.tensor.is_floating_point():
            raise LayoutError(f"{self.name}: only floating-point tensors are divided or averaged")
        if not (isinstance(self.divisor, int | float) and isfinite(self.divisor) and self.divisor > 0):
            raise LayoutError(f"{self.name}: divisor {self.divisor} is not a positive finite number")

    @property
    def box(self) -> Box:
        return Box(self.offset, tuple(self.tensor.shape))

    @property
    def memory(self) -> tuple[object, ...]:
        """Equal for pieces that hold the same box in the same memory in the same form."""
        t = self.tensor
        strides = tuple(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
        form = (t.shape, strides, t.dtype, t.is_conj(), t.is_neg())
        return (t.data_ptr(), t.device, self.offset, self.global_shape, *form)

    @staticmethod
    def flat(name: str, tensor: torch.Tensor, start: int, global_shape: Shape) -> list[Piece]:
        """The pieces of a range of the row-major flattening, as ZeRO partitions hold: `tensor` is one-dimensional.

        Element `start` of the flattened tensor is the first; what reaches past its end is padding and is left out. A
        range that begins or ends inside a row is several boxes: views of `tensor`, at most 2n - 1 in n dimensions.
        """
        if tensor.dim() != 1 or start < 0 or any(n < 0 for n in global_shape):
            raise LayoutError(f"{name}: a flat range is one-dimensional, of a shape, and starts at 0 or later")
        stop = min(start + tensor.numel(), prod(global_shape))
        pieces = []
        for box, first in flat_boxes(start, stop, global_shape):
            part = tensor[first - start : first - start + box.numel]
            pieces.append(Piece(name, part.view(box.size), box.offset, global_shape))
        return pieces

    @staticmethod
    def runs(
        name: str, tensor: torch.Tensor, runs: Sequence[Sequence[Interval]], global_shape: Shape, mean: bool = False
    ) -> list[Piece]:
        """The pieces of a local tensor that is made of several ranges in some dimension, as views of it.

        `runs` has, for every dimension, the (start, length) of the logical ranges that lie there one after the other:
        a tensor-parallel rank's rows of a fused query, key and value are `[(q0, q), (k0, k), (v0, v)]`. What reaches
        past the end of the logical tensor is padding and is left out.
        """
        if len(runs) != len(global_shape) or tuple(sum(n for _, n in held) for held in runs) != tuple(tensor.shape):
            raise LayoutError(f"{name}: ranges {list(runs)} do not add up to a local shape {tuple(tensor.shape)}")
        if all(
            len(held) == 1 and held[0][0] + held[0][1] <= size for held, size in zip(runs, global_shape, strict=True)
        ):
            return [Piece(name, tensor, tuple(held[0][0] for held in runs), global_shape, mean=mean)]
        pieces = []
        for combination in product(*(_placed(held, size) for held, size in zip(runs, global_shape, strict=True))):
            view = tensor[tuple(slice(at, at + length) for at, _, length in combination)]
            pieces.append(Piece(name, view, tuple(start for _, start, _ in combination), global_shape, mean=mean))
        return pieces


def _placed(held: Sequence[Interval], size: int) -> list[tuple[int, int, int]]:
    """Each range with where it lies in the local tensor, without padding: (local start, logical start, length)."""
    ends = accumulate(length for _, length in held)
    placed = [(end - length, start, min(length, size - start)) for end, (start, length) in zip(ends, held, strict=True)]
    return [(at, start, length) for at, start, length in placed if length > 0]


def parts_of(piece: Piece, limit: int) -> Iterator[Piece]:
    """A piece in leading rows of about `limit` bytes, or one row, as views of it."""
    size = piece.tensor.shape
    rows = max(1, limit * size[0] // piece.tensor.nbytes) if size and piece.tensor.numel() else 0
    if not rows or rows >= size[0]:
        yield piece
        return
    for start in range(0, size[0], rows):
        yield replace(
            piece,
            tensor=piece.tensor.detach()[start : start + rows],
            offset=(piece.offset[0] + start, *piece.offset[1:]),
        )


class Slice(NamedTuple):
    """A tensor's part of a parameter: `length` elements of its row-major flattening from `start` on, which lie at
    `position` in the tensor's own."""

    parameter: torch.Tensor
    start: int
    length: int
    position: int


@dataclass(frozen=True, slots=True)
class External:
    """A logical tensor whose bytes are not stored, such as a frozen base: where they come from and their SHA-256.

    It stands among the pieces. A load must bring one of the same name, dtype, shape and hash, which says that its
    tensor holds those bytes; a different `source` is welcome.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    source: str
    sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _whole_numbers(self.name, self.shape))
        object.__setattr__(self, "source", str(self.source))
        if any(n < 0 for n in self.shape) or not re.fullmatch("[0-9a-f]{64}", str(self.sha256)):
            raise LayoutError(f"{self.name}: an external tensor has a shape, and a SHA-256 of 64 hexadecimal digits")


def _whole_numbers(name: str, values: Iterable[object]) -> Shape:
    try:
        return tuple(index(value) for value in values)  # type: ignore[arg-type]  # what is no number is refused
    except TypeError:
        raise LayoutError(f"{name}: {values!r} are no whole numbers") from None
