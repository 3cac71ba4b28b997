"""How a shard file is laid out: blocks, panels, headers; and what a writer covers."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from checkpointing.format import (
    COVER_PARTS,
    PAGE,
    LogicalTensor,
    StoredBox,
    block_size,
    checksums,
    cover,
    lay_out,
    meet,
    panels_of,
    stored_bytes,
    stored_panels,
    sums_size,
)
from checkpointing.geometry import Box, intersect


def test_block_sizes_grow_with_the_box_within_bounds() -> None:
    assert block_size(1) == block_size(64 * PAGE) == PAGE
    assert block_size(64 * PAGE + 1) == 2 * PAGE
    assert block_size(10**9) == 64 * PAGE


def test_shard_header_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = {"a": LogicalTensor("BF16", (512, 128)), "b": LogicalTensor("F32", (5,)), "c": LogicalTensor("F32", (3,))}
    large = Box((0, 0), (512, 128))
    boxes = [("a", large), ("b", Box((0,), (5,))), ("c", Box((1,), (2,)))]
    header, placed = lay_out(boxes, tensors, "ab" * 16)
    assert len(header) == PAGE
    assert [(p.name, p.start) for p in placed] == [("b", 0), ("c", 20), ("a", 28)]
    file = tmp_path / "shard.safetensors"
    assert [p.sums for p in placed] == [0, 8, 16]
    data, sums = stored_bytes(placed, tensors)
    assert (data, sums) == (28 + 512 * 128 * 2, 16 + 16 * 2 * 8)  # of each panel of 8 KiB two blocks
    file.write_bytes(header + bytes(data) + b"\1" * sums)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["save_id"] == "ab" * 16
        assert set(opened.keys()) == {"@packed-F32", *(f"a@0,{8 * n}" for n in range(16)), "@checksums"}
        assert opened.get_tensor("@checksums").tolist() == [1] * sums
        assert opened.get_tensor("@packed-F32").shape == (7,)
        assert opened.get_tensor("a@0,16").shape == (512, 8)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_panels_share_out_the_bytes_and_checksums_of_their_box(rows: int, columns: int, data: st.DataObject) -> None:
    tensor = LogicalTensor("F64", (rows, columns))
    left = data.draw(st.integers(0, columns - 1))
    box = Box((0, left), (rows, data.draw(st.integers(1, columns - left))))
    cut = [sums_size(panel.numel * 8) for panel in panels_of(box, tensor)]
    stored = StoredBox("w", box, 0, 24)
    parts = list(stored_panels(stored, tensor))
    assert [part.sums for part in parts] == [24 + sum(cut[:n]) for n in range(len(cut))]
    assert stored_bytes([stored], {"w": tensor}) == (box.numel * 8, 24 + sum(cut))
    assert [part.start for part in parts] == [sum(p.box.numel * 8 for p in parts[:n]) for n in range(len(parts))]
    assert sum(part.box.numel for part in parts) == box.numel
    wanted = Box((0, data.draw(st.integers(0, columns - 1))), (rows, 1))
    met = list(stored_panels(stored, tensor, wanted))
    assert met == [part for part in parts if intersect(part.box, wanted)]


def test_checksums_follow_the_blocks() -> None:
    data = memoryview(bytes(range(256)) * 40)
    sums = checksums(data, PAGE)
    assert len(sums) == 8 * 3
    changed = bytearray(data)
    changed[PAGE] ^= 1
    differing = [i for i in range(3) if sums[8 * i : 8 * i + 8] != checksums(memoryview(changed), PAGE)[8 * i :][:8]]
    assert differing == [1]


@st.composite
def box_in(draw: st.DrawFn) -> tuple[Box, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 200_000), min_size=1, max_size=3)))
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))), shape


@given(st.lists(box_in(), min_size=1, max_size=5), st.data())
def test_a_cover_meets_whatever_meets_one_of_its_boxes(boxes: list, data: st.DataObject) -> None:
    """A reader may look in vain, and never misses a writer."""
    box, shape = data.draw(st.sampled_from(boxes))
    offset = tuple(data.draw(st.integers(o, o + n - 1)) for o, n in zip(box.offset, box.size, strict=True))
    wanted = cover([(Box(offset, (1,) * len(shape)), shape)], everything=True)
    assert meet(cover(boxes), wanted) or box.size == shape
    assert meet(cover(boxes, everything=True), wanted)


def test_covers_tell_shards_apart() -> None:
    halves = [cover([(Box((4 * r, 0), (4, 6)), (8, 6)), (Box((50 * r,), (50,)), (100,))]) for r in range(2)]
    assert halves[0] == ((0, COVER_PARTS // 2), (0, COVER_PARTS))
    assert not meet(halves[0], halves[1])
    assert not meet(cover([]), halves[0])
