"""Comparing generations: bit for bit, across layouts, with sizes of what differs."""

from __future__ import annotations

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointing import Piece, save, stream
from checkpointing.diff import Difference, compare
from checkpointing.generations import newest
from checkpointing.reader import GenerationReader
from checkpointing.stores import MemoryStorage
from tests.harness.threads import all_of, on_ranks


def whole(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def saved(*pieces: Piece) -> GenerationReader:
    storage = MemoryStorage()
    save(storage, 1, pieces)
    return opened(storage)


def opened(storage: MemoryStorage) -> GenerationReader:
    found = newest(storage)
    assert found is not None and found.manifest is not None
    return GenerationReader(storage, found.manifest)


def test_how_it_was_sharded_does_not_matter() -> None:
    tensor = torch.randn(60, 400)
    sharded = MemoryStorage()

    def part(rank: int) -> Piece:
        return Piece("w", tensor[:, 100 * rank : 100 * (rank + 1)], (0, 100 * rank), (60, 400))

    all_of(on_ranks(4, lambda team: save(sharded, 7, [part(team.rank)], group=team)))
    assert list(compare(saved(whole("w", tensor)), opened(sharded))) == [Difference("w", "equal")]


def test_every_kind_of_difference() -> None:
    a = saved(
        whole("both", torch.tensor([1.0, 2.0])),
        whole("empty", torch.zeros(0, 3)),
        whole("gone", torch.ones(1)),
        whole("shape", torch.ones(2)),
        whole("step", torch.tensor(3)),
        whole("zero", torch.tensor([0.0, float("nan"), float("inf")])),
    )
    b = saved(
        whole("both", torch.tensor([1.0, 4.0])),
        whole("empty", torch.zeros(0, 3)),
        whole("new", torch.ones(1)),
        whole("shape", torch.ones(2, 1)),
        whole("step", torch.tensor(5)),
        whole("zero", torch.tensor([-0.0, float("nan"), float("inf")])),
    )
    found = {d.name: (d.state, d.max_abs, d.max_rel) for d in compare(a, b)}
    assert found == {
        "both": ("different", 2.0, 0.5),
        "empty": ("equal", None, None),
        "gone": ("only in a", None, None),
        "new": ("only in b", None, None),
        "shape": ("another shape or dtype", None, None),
        "step": ("different", 2.0, 0.4),
        "zero": ("different", 0.0, 0.0),  # the sign of zero is a bit too
    }


def test_where_only_one_is_a_number_the_difference_is_infinite() -> None:
    a, b = (saved(whole("w", torch.tensor([1.0, value]))) for value in (2.0, float("nan")))
    (found,) = compare(a, b)
    assert (found.state, found.max_abs, found.max_rel) == ("different", inf, inf)


@given(at=st.integers(0, 999), chunk=st.sampled_from([1, 100, 10**9]))
@settings(max_examples=25, deadline=None)
def test_one_changed_element_is_found_wherever_it_lies(at: int, chunk: int) -> None:
    tensor = torch.arange(1000.0).reshape(50, 20)
    other = tensor.clone()
    other.view(-1)[at] += 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PART_BYTES", chunk)
        (found,) = compare(saved(whole("w", tensor)), saved(whole("w", other)))
    assert (found.state, found.max_abs) == ("different", 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.uint64, torch.complex64])
def test_every_kind_of_number(dtype: torch.dtype) -> None:
    a, b = (saved(whole("w", torch.tensor([0, value, 1]).to(dtype))) for value in (0, 1))
    assert [d.max_abs for d in compare(a, b)] == [1.0]
    assert [d.state for d in compare(a, a)] == ["equal"]


def test_large_integers_are_told_apart_exactly() -> None:
    a, b = (saved(whole("w", torch.tensor([2**60 + n, -5]))) for n in (0, 1))
    (found,) = compare(a, b)
    assert found.state == "different" and found.max_abs == 1.0 and found.max_rel == 1 / (2**60 + 1)
