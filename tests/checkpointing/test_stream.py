"""Tensors part by part are the tensors."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import Piece, save, stream
from checkpointing.generations import newest
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage
from checkpointing.stream import boxes, read


@given(st.lists(st.integers(0, 7), max_size=3), st.sampled_from([1, 2, 4, 8]), st.integers(1, 200))
def test_boxes_follow_each_other_and_are_small(shape: list[int], itemsize: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PART_BYTES", most)
        found = list(boxes(tuple(shape), itemsize))
    assert sum(box.numel for box in found) == prod(shape)
    assert [box.offset[0] for box in found] == sorted({box.offset[0] for box in found}) if shape else len(found) == 1
    row = prod(shape[1:]) * itemsize
    assert all(box.numel * itemsize <= max(most, row) for box in found)


def test_parts_put_together_are_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(7 * 5, dtype=torch.int16).reshape(7, 5)
    halves = [Piece("a", whole[:, :2].clone(), (0, 0), (7, 5)), Piece("a", whole[:, 2:].clone(), (0, 2), (7, 5))]
    save(tmp_path, 1, halves)
    generation = newest(FileStorage(tmp_path))
    assert generation is not None and generation.manifest is not None
    reader = GenerationReader(FileStorage(tmp_path), generation.manifest)
    monkeypatch.setattr(stream, "PART_BYTES", 25)
    parts = [read(reader, "a", box) for box in boxes((7, 5), 2)]
    assert [len(part) for part in parts] == [2, 2, 2, 1] and torch.equal(torch.cat(parts), whole)
