"""Boxes: intersection, cutting into panels, exact cover."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import LayoutError
from checkpointing.geometry import COLUMN_GRID, Box, Piece, check_tiling, find_hole, intersect, panels

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@st.composite
def box_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, n)) for n in shape]
    stops = [draw(st.integers(a, n)) for a, n in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(b - a for a, b in zip(starts, stops, strict=True)))


def marked(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[box.slices((0,) * len(shape))] = True
    return mask


@given(st.data(), shapes)
def test_intersect_is_the_set_of_common_elements(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(box_in(shape)), data.draw(box_in(shape))
    common = intersect(a, b)
    both = marked(a, shape) & marked(b, shape)
    assert common is None if not both.any() else (marked(common, shape) == both).all()


@given(st.data(), shapes)
def test_panels_tile_their_box_on_the_global_grid(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(box_in(shape))
    cuts = panels(box, shape)
    count = sum(marked(cut, shape).astype(int) for cut in cuts)
    assert (count == marked(box, shape)).all()
    if len(shape) > 1:
        step = -(-shape[-1] // COLUMN_GRID)
        inner = [cut.offset[-1] for cut in cuts[1:]]
        assert all(offset % step == 0 for offset in inner)


def test_vectors_are_not_cut() -> None:
    assert panels(Box((3,), (1000,)), (2000,)) == [Box((3,), (1000,))]


@pytest.mark.parametrize("ways", [2, 4, 8, 16])
def test_column_shards_start_on_a_cut(ways: int) -> None:
    lines = {cut.offset[-1] for cut in panels(Box((0, 0), (8, 4096)), (8, 4096))}
    assert {4096 // ways * k for k in range(ways)} <= lines


def test_tiling_accepts_exact_cover_and_empty_boxes() -> None:
    check_tiling("w", [Box((0, 0), (2, 5)), Box((2, 0), (1, 3)), Box((2, 3), (1, 2)), Box((3, 0), (0, 5))], (3, 5))
    check_tiling("scalar", [Box((), ())], ())
    check_tiling("empty", [], (0, 4))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box((0, 0), (2, 5))], "5 of 15 elements are held by no rank"),
        ([Box((0, 0), (2, 5)), Box((1, 0), (2, 5))], "two different boxes both hold"),
        ([Box((0, 0), (4, 5))], "leaves the tensor"),
        ([], "15 of 15 elements"),
    ],
)
def test_tiling_names_holes_overlaps_and_excess(boxes: list[Box], message: str) -> None:
    with pytest.raises(LayoutError, match=f"w: .*{message}"):
        check_tiling("w", boxes, (3, 5))


@given(st.data(), shapes)
def test_tiling_agrees_with_counting(data: st.DataObject, shape: tuple[int, ...]) -> None:
    boxes = data.draw(st.lists(box_in(shape), max_size=4))
    count = sum((marked(b, shape).astype(int) for b in boxes), np.zeros(shape, int))
    try:
        check_tiling("w", boxes, shape)
        tiled = True
    except LayoutError:
        tiled = False
    assert tiled == bool((count == 1).all())


def test_a_piece_must_lie_in_its_tensor() -> None:
    with pytest.raises(LayoutError, match="does not lie in a tensor of shape"):
        Piece("w", torch.zeros(2, 3), (3, 0), (4, 3))
    with pytest.raises(LayoutError, match="does not lie in"):
        Piece("w", torch.zeros(2, 3), (0,), (4, 3))


def test_numbers_of_other_libraries_are_plain_afterwards() -> None:
    piece = Piece("w", torch.ones(2), [np.int64(1)], [np.int64(5)])  # type: ignore[arg-type]
    assert (piece.offset, piece.global_shape) == ((1,), (5,))
    assert all(type(n) is int for n in (*piece.offset, *piece.global_shape))


def test_only_plain_local_tensors_are_pieces() -> None:
    class Subclass(torch.Tensor):
        pass

    for tensor in (torch.ones(2).as_subclass(Subclass), torch.nn.Parameter(torch.ones(2).as_subclass(Subclass))):
        with pytest.raises(LayoutError, match="holds a plain local tensor, not a"):
            Piece("w", tensor, (0,), (2,))


@given(st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple), st.data())
def test_a_flat_range_is_its_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = prod(shape)
    start = data.draw(st.integers(0, count))
    length = data.draw(st.integers(0, count + 3))
    whole = torch.arange(count).reshape(shape)
    local = torch.full((length,), -1)
    pieces = Piece.flat("w", local, start, shape)
    assert len(pieces) <= max(1, 2 * len(shape) - 1)
    for piece in pieces:  # views: what is loaded into a piece is loaded into the range
        piece.tensor.copy_(whole[piece.box.slices((0,) * len(shape))])
    stop = min(start + length, count)
    assert local.tolist() == [*range(start, stop), *[-1] * (length - max(0, stop - start))]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.integers(1, 5))
def test_flat_partitions_tile_the_tensor(shape: tuple[int, ...], ranks: int) -> None:
    size = -(-prod(shape) // ranks)  # ZeRO pads the last partition
    boxes = [p.box for r in range(ranks) for p in Piece.flat("w", torch.zeros(size), r * size, shape)]
    check_tiling("w", boxes, shape)
    if len(boxes) > 1:
        with pytest.raises(LayoutError):
            check_tiling("w", boxes[1:], shape)


def test_what_is_no_flat_range_is_refused() -> None:
    for tensor, start in ((torch.zeros(2, 2), 0), (torch.zeros(2), -1)):
        with pytest.raises(LayoutError, match="a flat range is one-dimensional"):
            Piece.flat("w", tensor, start, (4,))


@st.composite
def some_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    boxes = []
    for _ in range(draw(st.integers(0, 7))):
        offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
        boxes.append(Box(offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))))
    return shape, boxes


@given(some_boxes())
def test_a_hole_is_found_where_there_is_one(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    held = np.zeros(shape, dtype=bool)
    for box in boxes:
        held[box.slices((0,) * len(shape))] = True
    hole = find_hole(boxes, shape)
    assert (hole is None) == held.all()
    if hole is not None:
        assert hole.numel and not held[hole.slices((0,) * len(shape))].any()


@pytest.mark.usefixtures("long")
def test_many_shards_side_by_side_are_looked_at_once_each() -> None:
    for dim in (0, 1):
        boxes = [
            Box(tuple(r if d == dim else 0 for d in (0, 1)), tuple(1 if d == dim else 9 for d in (0, 1)))
            for r in range(20000)
        ]
        shape = tuple(20000 if d == dim else 9 for d in (0, 1))
        assert find_hole(boxes, shape) is None
        lost = find_hole(boxes[:777] + boxes[778:], shape)
        assert lost == boxes[777]
    assert find_hole([], (0, 4)) is None
