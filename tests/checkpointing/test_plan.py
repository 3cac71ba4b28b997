"""Planning: who writes what, who reads what, and what is refused."""

from __future__ import annotations

import pytest
import torch

from checkpointing import LayoutError, MismatchError, Piece
from checkpointing.format import Index, LogicalTensor, StoredBox
from checkpointing.geometry import Box
from checkpointing.plan import check_complete, layout_rows, plan_load, plan_save, stored_by_name


def rows(*pieces: Piece) -> list:
    return layout_rows(pieces)


def whole(name: str, *shape: int) -> Piece:
    return Piece(name, torch.zeros(shape), (0,) * len(shape), shape)


def test_replicas_share_the_writing_by_bytes() -> None:
    sizes = {"a": 100, "b": 60, "c": 50, "d": 10}
    layout = rows(*(whole(name, size) for name, size in sizes.items()))
    plan = plan_save([layout, layout])
    load = [sum(box.numel for _, box in boxes) for boxes in plan.boxes]
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


def test_small_boxes_are_packed_and_large_ones_cut() -> None:
    plan = plan_save([rows(whole("small", 4, 4), whole("large", 256, 256))])
    stored = plan.shard_boxes(0)
    assert [(name, packed) for name, _, packed in stored if name == "small"] == [("small", True)]
    assert sum(name == "large" for name, _, _ in stored) == 16


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
        return Index("id", [StoredBox("w", box, 0, "") for box in boxes], {})

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
