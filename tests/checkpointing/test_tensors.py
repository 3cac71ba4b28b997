"""The bytes of tensors, and casts that keep every value."""

from __future__ import annotations

import hashlib
from itertools import product

import pytest
import torch

from checkpointing import DamagedError, LayoutError
from checkpointing.format import ITEM_BYTES
from checkpointing.tensors import (
    DTYPES,
    divided,
    external_of,
    keeps_values,
    multiplied,
    row_bytes,
    scalar_from_hex,
    scalar_hex,
    tensor_bytes,
)


@pytest.mark.parametrize("name", list(DTYPES))
def test_bytes_of_every_dtype(name: str) -> None:
    dtype = DTYPES[name]
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    raw = raw % 2 if dtype == torch.bool else raw
    tensor = raw.view(dtype).reshape(2, 3)
    assert bytes(tensor_bytes(tensor)) == bytes(raw.numpy())
    columns = bytes(tensor_bytes(tensor[:, 1:]))  # not contiguous
    assert columns == bytes(tensor_bytes(tensor[:, 1:].clone()))
    scalar = tensor[1, 2]
    back = scalar_from_hex(scalar_hex(scalar), dtype, "s")
    assert bytes(tensor_bytes(back.reshape(1))) == bytes(tensor_bytes(scalar.reshape(1)))


@pytest.mark.parametrize("text", ["", "00", "zz000000", "0000000000"])
def test_a_scalar_of_the_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(DamagedError, match="is not a scalar"):
        scalar_from_hex(text, torch.float32, "s")


@pytest.mark.parametrize("limit", [1, 7, 64, 10**9])
def test_bytes_come_a_bounded_part_at_a_time(limit: int) -> None:
    tensor = torch.arange(4 * 3 * 5, dtype=torch.int32).reshape(4, 5, 3).transpose(1, 2)
    parts = [bytes(part) for part in row_bytes(tensor, limit)]
    assert b"".join(parts) == bytes(tensor_bytes(tensor))
    assert max(map(len, parts)) <= max(limit, 4)


EVERY = [torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.uint16] + [
    dtype for name, dtype in DTYPES.items() if name.startswith("F8")
]


@pytest.mark.parametrize(("source", "target"), list(product(EVERY, DTYPES.values())), ids=str)
def test_a_cast_that_keeps_values_keeps_every_single_one(source: torch.dtype, target: torch.dtype) -> None:
    """All values of the short dtypes, there and back; a number that is not one stays that."""
    if not keeps_values(source, target):
        return
    word = torch.uint8 if source.itemsize == 1 else torch.uint16
    every = torch.arange(2 ** (8 * source.itemsize), dtype=torch.int32).to(word).view(source)
    back = every.to(target).to(source)
    same = (back.view(word).to(torch.int32) == every.view(word).to(torch.int32)) | (
        every.to(torch.float64).isnan() & back.to(torch.float64).isnan()
    )
    assert bool(same.all())


def test_which_casts_keep_values() -> None:
    assert keeps_values(torch.bfloat16, torch.float32) and keeps_values(torch.float16, torch.float32)
    assert keeps_values(torch.float8_e4m3fn, torch.bfloat16) and keeps_values(torch.uint8, torch.int16)
    assert not keeps_values(torch.float32, torch.bfloat16) and not keeps_values(torch.float16, torch.bfloat16)
    assert not keeps_values(torch.bfloat16, torch.float16) and not keeps_values(torch.int8, torch.uint16)
    assert not keeps_values(torch.int64, torch.float64) and not keeps_values(torch.complex64, torch.float64)


@pytest.mark.parametrize("divisor", [1, 2, 3, 4, 6, 7, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_divisions_by_powers_of_two_are_undone_and_others_to_the_last_bit(divisor: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    back = multiplied(divided(tensor, divisor, dtype), divisor)
    exact = divisor & (divisor - 1) == 0
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert int((back.view(word) - tensor.view(word)).abs().max()) <= (0 if exact else 1)


def test_the_hash_of_an_external_tensor_is_that_of_its_row_major_bytes() -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).T
    found = external_of("model/w", tensor, "a hub id")
    assert found.sha256 == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    assert (found.name, found.dtype, found.shape, found.source) == ("model/w", torch.float32, (4, 3), "a hub id")


def test_a_divisor_that_leaves_the_range_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"beyond the range of torch\.float16"):
        multiplied(torch.tensor([30000.0], dtype=torch.float16), 4)
    assert multiplied(torch.tensor([float("inf")]), 4).item() == float("inf")  # it was there before


def test_a_divisor_does_not_take_more_room() -> None:
    parts = [len(part) for part in row_bytes(torch.zeros(4096, dtype=torch.uint8).view(torch.float8_e5m2), 1600, 2)]
    assert max(parts) <= 100  # at 16 bytes of temporaries each


def test_a_sharded_tensor_has_no_hash_of_its_own() -> None:
    class Sharded(torch.Tensor):
        pass

    with pytest.raises(LayoutError, match="of a whole plain tensor, not of a Sharded"):
        external_of("w", torch.zeros(2).as_subclass(Sharded), "x")


def test_the_format_knows_the_bytes_of_an_element_of_every_dtype() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES
