"""Reading parts of stored boxes: the right elements, and no byte that has not passed its checksum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing import Box, DamagedError, Piece, load, save
from checkpointing import reader as reader_module
from checkpointing import writer as writer_module
from checkpointing.format import StoredBox, block_size, shard_name, stored_bytes
from checkpointing.generations import newest
from checkpointing.geometry import COLUMN_GRID
from checkpointing.reader import Fetch, GenerationReader, join_neighbours
from checkpointing.storage import FileStorage

SHAPE = (24, 5, 300)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    directory = tmp_path_factory.mktemp("stored")
    tensor = torch.arange(24 * 5 * 300, dtype=torch.float32).reshape(SHAPE)
    save(directory, 1, [Piece("w", tensor, (0, 0, 0), SHAPE), Piece("one", torch.tensor([7.0]), (0,), (1,))])
    return directory, tensor


def open_reader(directory: Path) -> GenerationReader:
    storage = FileStorage(directory)
    generation = newest(storage)
    assert generation is not None and generation.manifest is not None
    return GenerationReader(storage, generation.manifest)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    offset = tuple(draw(st.integers(0, n - 1)) for n in SHAPE)
    return Box(offset, tuple(draw(st.integers(1, n - o)) for n, o in zip(SHAPE, offset, strict=True)))


@given(boxes())
@settings(max_examples=60, deadline=None)
def test_any_box_is_filled_with_its_elements_and_nothing_else(stored: tuple[Path, torch.Tensor], box: Box) -> None:
    directory, tensor = stored
    reader = open_reader(directory)
    piece = Piece("w", torch.full(box.size, -1.0), box.offset, SHAPE)
    reader.load([piece])
    assert torch.equal(piece.tensor, tensor[box.slices((0, 0, 0))])


def test_only_the_blocks_that_are_touched_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = (64, 5, 3000)
    save(tmp_path, 1, [Piece("w", torch.zeros(large), (0, 0, 0), large)])
    reader = open_reader(tmp_path)
    piece = Piece("w", torch.ones(1, 5, 3000), (3, 0, 0), large)
    reader.load([piece])  # opens the index and the shard, whose header is read once
    ranges: list[tuple[int, int]] = []
    original = FileStorage.read_ranges

    def read_ranges(self: FileStorage, name: str, wanted: list[tuple[int, int]]) -> list[bytes]:
        ranges.extend(wanted)
        return original(self, name, wanted)

    monkeypatch.setattr(FileStorage, "read_ranges", read_ranges)
    reader.load([piece])
    panel = -(-3000 // COLUMN_GRID) * 64 * 5 * 4
    read = sum(stop - start for start, stop in ranges)
    assert 5 * 3000 * 4 <= read <= 5 * 3000 * 4 + COLUMN_GRID * 2 * block_size(panel) < 64 * 5 * 3000 * 4 / 10


def test_damage_elsewhere_does_not_matter_and_damage_in_the_way_does(
    stored: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    save(tmp_path, 1, [Piece("w", stored[1], (0, 0, 0), SHAPE)])
    reader = open_reader(tmp_path)
    shard = next(tmp_path.glob(f"*/{shard_name(0)}"))
    data = bytearray(shard.read_bytes())
    _, sums = stored_bytes(reader.index(0).boxes, reader.manifest.tensors)
    data[-sums - 1] ^= 1  # the last element of the last row
    shard.write_bytes(data)
    first, last = (Piece("w", torch.zeros(1, 5, 300), (row, 0, 0), SHAPE) for row in (0, 23))
    reader.load([first])
    assert torch.equal(first.tensor[0], stored[1][0])
    with pytest.raises(DamagedError, match=r"checksum of bytes \d+ to \d+ does not match; they belong to w"):
        reader.load([last])
    assert [name for name, _, error in reader.verify() if error] == [shard_name(0)]


def test_checksums_are_checked_before_they_are_believed(stored: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    save(tmp_path, 1, [Piece("w", stored[1], (0, 0, 0), SHAPE)])
    shard = next(tmp_path.glob(f"*/{shard_name(0)}"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match="the checksums are not those that were committed"):
        open_reader(tmp_path).load([Piece("w", torch.zeros(1, 5, 300), (0, 0, 0), SHAPE)])
    assert [name for name, _, error in open_reader(tmp_path).verify() if error] == [shard_name(0)]  # said once


def test_verify_touches_every_stored_byte(stored: tuple[Path, torch.Tensor]) -> None:
    checked = list(open_reader(stored[0]).verify())
    assert all(error is None for _, _, error in checked)
    assert sum(nbytes for _, nbytes, _ in checked) == (24 * 5 * 300 + 1) * 4


def fetch(writer: int, start: int, stop: int) -> Fetch:
    box = Box((0,), (1,))
    return Fetch(writer, StoredBox("w", box, 0), box, box, None, start, stop, 0)


def test_neighbours_share_a_read_call() -> None:
    fetches = [fetch(0, 100, 200), fetch(0, 0, 100), fetch(1, 0, 10), fetch(0, 300, 400), fetch(0, 150, 250)]
    runs = [[(f.writer, f.start, f.stop) for f in run] for run in join_neighbours(fetches)]
    assert runs == [[(0, 0, 100), (0, 100, 200), (0, 150, 250)], [(0, 300, 400)], [(1, 0, 10)]]
    assert [len(run) for run in join_neighbours(fetches, limit=150)] == [1, 2, 1, 1]
    assert list(join_neighbours([])) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_and_memory_do_not_change_what_is_loaded(
    stored: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    directory, tensor = stored
    monkeypatch.setattr(reader_module, "num_threads", lambda: threads)
    for limit in (100, 5000, 10**9):
        reader = open_reader(directory)
        reader._limit = limit
        pieces = [Piece("w", torch.zeros(7, 5, 100), (r, 0, c), SHAPE) for r in (0, 7, 14) for c in (0, 100, 200)]
        reader.load(pieces)
        assert all(torch.equal(p.tensor, tensor[p.box.slices((0, 0, 0))]) for p in pieces)


def test_a_plan_is_used_again_for_the_same_boxes_of_the_same_generation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    plan_load = reader_module.plan_load
    monkeypatch.setattr(reader_module, "plan_load", lambda *args: made.append(1) or plan_load(*args))

    def rows(value: float, start: int = 0) -> list[Piece]:
        return [Piece("w", torch.full((40, 500), value), (start, 0), (80, 500)) for start in (start, 40 - start)]

    for step in (1, 2):
        save(tmp_path, step, rows(float(step)))
        for _ in range(3):
            target = rows(0.0)
            open_reader(tmp_path).load(target)
            assert all(bool((piece.tensor == step).all()) for piece in target)
    assert len(made) == 2
    open_reader(tmp_path).load(rows(0.0)[:1])
    open_reader(tmp_path).load(rows(0.0)[::-1])
    assert len(made) == 4


def test_verify_sees_a_tensor_without_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a writer with a bug would leave it, with every checksum right."""
    real = writer_module.lay_out
    monkeypatch.setattr(writer_module, "lay_out", lambda boxes, *rest: real([b for b in boxes if b[0] != "b"], *rest))
    pieces = [Piece(name, torch.ones(40, 500), (0, 0), (40, 500)) for name in "ab"]
    save(tmp_path, 1, pieces)
    (error,) = [error for _, _, error in open_reader(tmp_path).verify() if error]
    assert "b: 20000 of 20000 elements are held by no rank" in str(error)
    with pytest.raises(DamagedError, match="b: the checkpoint holds 0 of the 20000 elements"):
        load(tmp_path, pieces)
