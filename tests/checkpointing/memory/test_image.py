"""What a snapshot copies is, byte for byte, what a save writes."""

from __future__ import annotations

import secrets
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing import Piece
from checkpointing.format import index_name, shard_name
from checkpointing.generations import read
from checkpointing.memory.image import CHUNK_BYTES, Image, copy_part
from checkpointing.plan import RankPlan, layout_rows, plan_save
from checkpointing.stores import MemoryStorage
from checkpointing.writer import write_shard

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


def plan_of(pieces: list[Piece]) -> RankPlan:
    return plan_save([layout_rows(pieces)]).of(0)


def imaged(image: Image, pieces: list[Piece], save_id: str) -> tuple[bytes, bytes, object]:
    memory = memoryview(bytearray(image.nbytes))
    image.start(memory, save_id)
    for part in reversed(image.parts):  # in any order
        copy_part(part, pieces[part.piece], memory)
    writer, index = image.finish(memory, pieces, save_id, {"k": 1})
    return bytes(memory), index, writer


def saved(plan: RankPlan, pieces: list[Piece], save_id: str) -> tuple[bytes, bytes, object]:
    storage = MemoryStorage()
    writer = write_shard(storage, "g", plan, pieces, 0, save_id, {"k": 1})
    shard, index = (read(storage, f"g/{name}") for name in (shard_name(0), index_name(0)))
    return shard, index, writer


shapes = (
    st.lists(st.sampled_from([1, 2, 3, 16, 47, 64, 101, 257]), min_size=0, max_size=3)
    .map(tuple)
    .filter(lambda shape: prod(shape) <= 257 * 257)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=5), st.integers(0, 99))
def test_a_snapshot_is_what_a_save_writes(tensors: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> None:
    pieces = [
        Piece(f"t{n}", filled(shape, dtype, seed + n), (0,) * len(shape), shape)
        for n, (shape, dtype) in enumerate(tensors)
    ]
    plan, save_id = plan_of(pieces), secrets.token_hex(16)
    image = Image(plan, pieces, 0)
    assert imaged(image, pieces, save_id) == saved(plan, pieces, save_id)
    # And again, of other values: nothing of the first stays.
    others = [Piece(p.name, filled(tuple(p.tensor.shape), p.tensor.dtype, 7), p.offset, p.global_shape) for p in pieces]
    again = secrets.token_hex(16)
    assert imaged(image, others, again) == saved(plan, others, again)
    assert imaged(image, others, again) != saved(plan, others, save_id)


@pytest.mark.parametrize(
    "tensor",
    [
        filled((3000, 1500), torch.float32, 1),  # several parts, cut between blocks
        filled((1500, 3000), torch.float32, 2).t(),  # columns that lie apart
        filled((7_000_001,), torch.bfloat16, 3),
        filled((2, 3, 500_009), torch.float32, 4),  # rows that no block ends with
        filled((1, 5_000_000), torch.float32, 5),
    ],
    ids=["parts", "transposed", "vector", "prime", "row"],
)
def test_large_tensors_are_copied_in_parts(tensor: torch.Tensor) -> None:
    pieces = [Piece("t", tensor, (0,) * tensor.dim(), tuple(tensor.shape))]
    plan = plan_of(pieces)
    image = Image(plan, pieces, 0)
    assert tensor.nbytes > 2 * CHUNK_BYTES
    assert imaged(image, pieces, "5" * 32) == saved(plan, pieces, "5" * 32)


def test_divided_tensors_are_stored_whole() -> None:
    pieces = [Piece("t", filled((300, 400), torch.int16, 1).float(), (0, 0), (300, 400), divisor=4)]
    plan = plan_of(pieces)
    assert imaged(Image(plan, pieces, 0), pieces, "5" * 32) == saved(plan, pieces, "5" * 32)


def test_a_shard_of_columns(tmp_path: Path) -> None:
    whole = filled((640, 512), torch.float32, 1)
    pieces = [Piece("t", whole[:, 128:300], (0, 128), (640, 512))]
    rest = [Piece("t", whole[:, :128], (0, 0), (640, 512)), Piece("t", whole[:, 300:], (0, 300), (640, 512))]
    plan = plan_save([layout_rows(pieces), layout_rows(rest)]).of(0)
    assert imaged(Image(plan, pieces, 0), pieces, "5" * 32) == saved(plan, pieces, "5" * 32)
