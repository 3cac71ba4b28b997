"""Planning: who writes what, who reads what, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import DamagedError, LayoutError, Piece, plan
from checkpointing.format import FEW_WRITERS, Index, LogicalTensor, Manifest, StoredBox, Writer
from checkpointing.geometry import Box, intersect
from checkpointing.plan import (
    Mean,
    SavePlan,
    find_tied,
    layout_rows,
    plan_load,
    plan_save,
    position_in,
    split,
    stored_by_name,
    windows,
    writers_needed,
)
from checkpointing.planner import _decode, _encode


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


def index(*boxes: Box) -> Index:
    return Index("id", [StoredBox("w", box, 0) for box in boxes], "", {})


def test_reads_cover_each_piece_once_or_are_refused() -> None:
    piece = Piece("w", torch.zeros(2, 4), (1, 0), (4, 4))
    tensors = {"w": LogicalTensor("F32", (4, 4))}
    halves = {0: index(Box((0, 0), (2, 4))), 1: index(Box((2, 0), (2, 4)))}
    reads = plan_load([piece], stored_by_name(halves), tensors)
    assert [(r.writer, r.part) for r in reads] == [(0, Box((1, 0), (1, 4))), (1, Box((2, 0), (1, 4)))]
    with pytest.raises(DamagedError, match="holds 4 of the 8 elements needed"):
        plan_load([piece], stored_by_name({0: halves[0]}), tensors)
    # As many elements as are needed, one row twice and another not at all.
    twice = {0: halves[0], 1: index(Box((1, 0), (1, 4)))}
    with pytest.raises(DamagedError, match="each of which it should hold once"):
        plan_load([piece], stored_by_name(twice), tensors)


def shards(name: str, size: int, ranks: int) -> list[list]:
    step = -(-size // ranks)
    cuts = [(min(r * step, size), min((r + 1) * step, size)) for r in range(ranks)]
    return [
        rows(Piece(name, torch.zeros(stop - start, 2), (start, 0), (size, 2))) if stop > start else []
        for start, stop in cuts
    ]


def manifest_of(plan: SavePlan, ranks: int) -> Manifest:
    writers = [Writer(r, 0, 0, "", "", plan.covers[r]) for r in range(ranks) if plan.boxes[r] or plan.scalars[r]]
    return Manifest(1, "", "", "", 0, 1, 0.0, ranks, {}, {}, writers, plan.tensors)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 12), st.data())
def test_the_indexes_that_are_needed_are_among_those_read(
    sizes: list[int], ranks: int, ways: int, data: st.DataObject
) -> None:
    layouts: list[list] = [[] for _ in range(ranks)]
    for number, size in enumerate(sizes):
        for rank, found in enumerate(shards(f"t{number}", size, ranks)):
            layouts[rank] += found
    plan = plan_save(layouts)
    manifest = manifest_of(plan, ranks)
    number = data.draw(st.integers(0, len(sizes) - 1))
    start = data.draw(st.integers(0, sizes[number] - 1))
    count = data.draw(st.integers(1, sizes[number] - start))
    piece = Piece(f"t{number}", torch.zeros(count, 2), (start, 0), (sizes[number], 2))
    holders = {r for r in range(ranks) for n, box in plan.boxes[r] if n == piece.name and intersect(box, piece.box)}
    assert holders <= {manifest.writers[i].rank for i in writers_needed([piece], manifest)}


def test_of_many_shards_a_rank_reads_few_indexes() -> None:
    ranks = 8 * FEW_WRITERS
    layouts = [a + b for a, b in zip(shards("a", 1024, ranks), shards("b", 5000, ranks), strict=True)]
    plan = plan_save(layouts)
    assert plan.tensors["a"].writers is None
    manifest = manifest_of(plan, ranks)
    quarter = [Piece(n, torch.zeros(size // 4, 2), (size // 4, 0), (size, 2)) for n, size in (("a", 1024), ("b", 5000))]
    assert len(writers_needed(quarter, manifest)) <= ranks / 4 + 2
    # Tensors that few wrote name them.
    plan = plan_save([rows(whole("c", 4)), *shards("d", 8, 3)])
    assert plan.tensors["c"].writers == (0,) and plan.tensors["d"].writers == (1, 2, 3)
    third = Piece("d", torch.zeros(3, 2), (3, 0), (8, 2))
    assert writers_needed([third], manifest_of(plan, 4)) == {2}


def test_tied_tensors_are_planned_once_under_the_first_name() -> None:
    memory = torch.zeros(4, 2)
    tied = [Piece(name, memory, (0, 0), (4, 2)) for name in ("head", "embedding")]
    assert find_tied(tied) == {"head": "embedding"}
    plan = plan_save([rows(*tied), rows(*tied)])
    assert plan.aliases == {"head": "embedding"} and list(plan.tensors) == ["embedding"]
    # Not tied on every rank that holds some of it: two tensors.
    apart = rows(Piece("head", torch.zeros(4, 2), (0, 0), (4, 2)), tied[1])
    plan = plan_save([rows(*tied), apart])
    assert plan.aliases == {} and list(plan.tensors) == ["embedding", "head"]
    # Another box of the same memory, or the same memory as another tensor, is no tie.
    assert find_tied([tied[0], Piece("embedding", memory[:3], (0, 0), (4, 2))]) == {}
    assert find_tied([tied[0], Piece("embedding", memory, (0, 0), (8, 2))]) == {}
    # Nothing in memory ties nothing.
    assert find_tied([Piece(n, torch.zeros(0), (0,), (0,)) for n in "ab"]) == {}


def test_a_tie_hides_no_hole() -> None:
    """Another rank has more of the first name, and nobody has that of the second."""
    memory = torch.zeros(4)
    tied = rows(*(Piece(name, memory, (0,), (8,)) for name in ("a", "b")))
    rest = rows(Piece("a", torch.zeros(4), (4,), (8,)))
    with pytest.raises(LayoutError, match=r"b: 4 of 8 elements are held by no rank, such as those at \(4,\) of size"):
        plan_save([tied, rest])


def test_what_is_held_divided_is_no_tie() -> None:
    memory = torch.zeros(4)
    assert find_tied([Piece("a", memory, (0,), (4,)), Piece("b", memory, (0,), (4,), divisor=2)]) == {}
    complex_ = torch.zeros(4, dtype=torch.complex64)
    assert find_tied([Piece("a", complex_, (0,), (4,)), Piece("b", complex_.conj(), (0,), (4,))]) == {}
    row = torch.zeros(1, 3)
    pieces = [Piece("a", row, (0, 0), (1, 3)), Piece("b", row.as_strided((1, 3), (7, 1)), (0, 0), (1, 3))]
    assert find_tied(pieces) == {"b": "a"}  # the stride of one row means nothing


def test_holes_of_several_tensors_are_named_together() -> None:
    half = rows(*(Piece(f"t{n}", torch.zeros(2), (0,), (4,)) for n in range(5)))
    with pytest.raises(LayoutError, match=r"^5 tensors: t0: 2 of 4 .*t1: .*t2: .* and 2 more$"):
        plan_save([half])


def test_replicas_share_the_writing_over_nodes() -> None:
    layout = rows(*(whole(f"t{n}", 8) for n in range(4)))
    plan = plan_save([layout] * 16, nodes=[rank // 8 for rank in range(16)])
    writers = [rank for rank, boxes in enumerate(plan.boxes) if boxes]
    assert sorted(rank // 8 for rank in writers) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), [torch.zeros(2)]],
    ids=["meta", "sparse", "list"],
)
def test_what_holds_no_values_is_refused(tensor: object) -> None:
    given = tensor if isinstance(tensor, list) else Piece("w", tensor, (0,), (2,))
    with pytest.raises(LayoutError, match=r"is no piece|holds no values"):
        split([given])


def test_averaged_boxes_name_their_holders() -> None:
    mean = rows(Piece("w", torch.zeros(3), (0,), (3,), mean=True))
    plan = plan_save([mean, [], mean])
    assert plan.means == [Mean("w", Box((0,), (3,)), (0, 2), 0)]
    assert plan_save([mean]).means == []
    with pytest.raises(LayoutError, match="w: rank 1 and another rank disagree on whether it is averaged"):
        plan_save([mean, rows(whole("w", 3))])


def test_a_plan_travels_whole() -> None:
    tied = torch.zeros(4, 2)
    layout = rows(
        Piece("b", tied, (0, 0), (4, 2)),
        Piece("a", tied, (0, 0), (4, 2)),
        Piece("m", torch.zeros(3), (0,), (3,), mean=True),
        whole("s"),
    )
    many = shards("z", 100, 2 * FEW_WRITERS)
    layouts = [layout + own for own in many]
    plan = plan_save(layouts)
    common, *shares = map(json.loads, _encode(plan))
    plans = [plan.of(rank, rows) for rank, rows in enumerate(layouts)]
    assert [_decode(common, share, rows) for share, rows in zip(shares, layouts, strict=True)] == plans
    assert all({name for name, _ in one.shared} == {"a", "b", "s"} for one in plans)  # no shard, and no mean


@pytest.mark.parametrize("name", ["", "a\nb", "\ud800"])
def test_names_that_no_file_could_hold_are_refused(name: str) -> None:
    with pytest.raises(LayoutError, match="is no name of a tensor"):
        rows(whole(name, 2))


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
