"""Planning: who writes what, who reads what, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import LayoutError, MismatchError, Piece, plan
from checkpointing.format import Index, LogicalTensor, StoredBox
from checkpointing.geometry import Box, intersect
from checkpointing.plan import (
    check_complete,
    layout_rows,
    plan_load,
    plan_save,
    position_in,
    stored_by_name,
    windows,
)


def rows(*pieces: Piece) -> list:
    return layout_rows(pieces)


def whole(name: str, *shape: int) -> Piece:
    return Piece(name, torch.zeros(shape), (0,) * len(shape), shape)


def test_replicas_share_the_writing_by_bytes() -> None:
    sizes = {"a": 100, "b": 60, "c": 50, "d": 10}
    layout = rows(*(whole(name, size) for name, size in sizes.items()))
    shared = plan_save([layout, layout])
    load = [sum(box.numel for _, box in boxes) for boxes in shared.boxes]
    assert sum(load) == 220
    assert max(load) <= 120


def test_the_plan_does_not_depend_on_the_order_of_pieces() -> None:
    a, b = rows(whole("a", 8), whole("b", 4)), rows(whole("b", 4), whole("a", 8))
    assert plan_save([a, b]) == plan_save([b, a])


def test_scalars_have_one_writer_and_no_box() -> None:
    layout = rows(whole("step"))
    plan = plan_save([layout, layout, layout])
    assert sorted(plan.scalars, key=len) == [[], [], ["step"]]
    assert plan.boxes == [[], [], []]


def test_disagreement_between_ranks_is_named() -> None:
    with pytest.raises(LayoutError, match=r"w: rank 1 holds F32 \(4,\), another rank F32 \(3,\)"):
        plan_save([rows(whole("w", 3)), rows(whole("w", 4))])
    with pytest.raises(LayoutError, match=r"w: rank 1 holds BF16"):
        plan_save([rows(whole("w", 3)), rows(Piece("w", torch.zeros(3, dtype=torch.bfloat16), (0,), (3,)))])
    with pytest.raises(LayoutError, match=r"w: rank 0 describes the box at .* twice"):
        plan_save([rows(whole("w", 3), whole("w", 3))])


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(LayoutError, match="complex128"):
        rows(Piece("w", torch.zeros(3, dtype=torch.complex128), (0,), (3,)))


def test_reads_cover_each_piece_or_are_refused() -> None:
    def index(*boxes: Box) -> Index:
        return Index("id", [StoredBox("w", box, 0, "0" * 16) for box in boxes], {})

    piece = Piece("w", torch.zeros(2, 4), (1, 0), (4, 4))
    reads = plan_load([piece], stored_by_name([index(Box((0, 0), (2, 4))), index(Box((2, 0), (2, 4)))]))
    assert [(r.writer, r.part) for r in reads] == [(0, Box((1, 0), (1, 4))), (1, Box((2, 0), (1, 4)))]
    with pytest.raises(MismatchError, match="holds 4 of the 8 elements needed"):
        plan_load([piece], stored_by_name([index(Box((0, 0), (2, 4)))]))


def test_missing_and_misshapen_tensors_are_named() -> None:
    stored = {"w": LogicalTensor("F32", (4,))}
    with pytest.raises(MismatchError, match="does not hold 2 of the tensors asked for: a, b"):
        check_complete([whole("a", 1), whole("b", 1), whole("w", 4)], stored)
    with pytest.raises(MismatchError, match=r"w \(F32 \[4\] stored, F32 \[5\] here\)"):
        check_complete([whole("w", 5)], stored)


@st.composite
def stored_and_part(draw: st.DrawFn) -> tuple[Box, Box]:
    size = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    offset = tuple(draw(st.integers(0, 5)) for _ in size)
    start = tuple(draw(st.integers(0, n - 1)) for n in size)
    count = tuple(draw(st.integers(1, n - s)) for n, s in zip(size, start, strict=True))
    return Box(offset, size), Box(tuple(o + s for o, s in zip(offset, start, strict=True)), count)


@given(stored_and_part(), st.integers(1, 300), st.sampled_from([0, 8, 10**6]))
def test_windows_are_contiguous_and_hold_the_part(boxes: tuple[Box, Box], limit: int, short: int) -> None:
    stored, part = boxes
    order = np.arange(stored.numel).reshape(stored.size)
    seen = np.zeros(stored.size, dtype=int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHORT_BYTES", short)
        cut = list(windows(stored, part, 4, limit))
    for window, held in cut:
        elements = order[window.slices(stored.offset)].ravel()
        first = position_in(stored, window)
        assert elements.tolist() == list(range(first, first + window.numel))
        assert intersect(window, held) == held
        assert window.numel * 4 <= limit or window.size[:-1] == (1,) * (len(window.size) - 1) or window.size[0] == 1
        seen[held.slices(stored.offset)] += 1
    expected = np.zeros(stored.size, dtype=int)
    expected[part.slices(stored.offset)] = 1
    assert (seen == expected).all()
    if short == 0 and limit >= stored.numel * 4:  # then nothing is read that is not asked for, but inside a last row
        row = stored.size[-1] if len(stored.size) > 1 else part.size[-1]
        assert sum(w.numel for w, _ in cut) <= part.numel // part.size[-1] * max(row, part.size[-1])


def test_middle_dimensions_are_read_without_what_lies_between() -> None:
    """Experts of a stack, or heads: only theirs are read, not whole rows around them."""
    stored = Box((0, 0, 0), (8, 64, 1024))
    part = Box((0, 16, 0), (8, 16, 1024))
    cut = list(windows(stored, part, 4))
    assert len(cut) == 8 and all(window == held for window, held in cut)


def test_large_boxes_are_read_a_bounded_part_at_a_time() -> None:
    stored = Box((0, 0), (1000, 1024))
    cut = list(windows(stored, stored, 4, limit=2**20))
    assert len(cut) == 4 and max(w.numel * 4 for w, _ in cut) <= 2**20
