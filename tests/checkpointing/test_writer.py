"""Streaming boxes to bytes: bounded chunks, and checksums that do not depend on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import Box, Piece
from checkpointing.format import checksums
from checkpointing.writer import BlockHasher, box_bytes
from tests.checkpointing.layouts_for_tests import bits


@given(st.binary(max_size=300), st.integers(1, 64), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_hashing_in_chunks_equals_hashing_blocks(data: bytes, block: int, sizes: list[int]) -> None:
    hasher, position = BlockHasher(block), 0
    while position < len(data):
        size = sizes[position % len(sizes)]
        hasher.update(memoryview(data)[position : position + size])
        position += size
    assert hasher.finish() == checksums(memoryview(data), block)


@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_large_boxes_are_streamed_by_rows(limit: int) -> None:
    local = torch.arange(12 * 10, dtype=torch.int32).reshape(12, 10).T  # not contiguous
    piece = Piece("w", local, (5, 0), (15, 12))
    box = Box((7, 3), (6, 8))
    chunks = [bytes(chunk) for chunk in box_bytes([piece], box, limit)]
    assert b"".join(chunks) == bits(local[2:8, 3:11])
    assert all(len(chunk) <= max(limit, 4) for chunk in chunks)
