"""Entries of a weight: how they are joined, numbered and added."""

from __future__ import annotations

import torch

from trainer.methods.entries import Entries, added, index_dtype


def test_two_that_have_none_in_common_are_joined_in_order() -> None:
    left = Entries(torch.tensor([1, 5]), torch.tensor([0.1, 0.5]), torch.tensor([10.0, 50.0]))
    right = Entries(torch.tensor([0, 3]), torch.tensor([0.0, 0.3]), torch.tensor([0.0, 30.0]))
    joined = left.joined(right)
    assert joined.indices.tolist() == [0, 1, 3, 5] and joined.originals.tolist() == [0.0, 10.0, 30.0, 50.0]
    torch.testing.assert_close(joined.values, torch.tensor([0.0, 0.1, 0.3, 0.5]))
    assert joined.at(torch.tensor([2])).indices.tolist() == [3]
    none = Entries.none(torch.int32, torch.bfloat16, torch.device("cpu"))
    assert none.indices.dtype is torch.int32 and none.originals.dtype is torch.bfloat16 and not none.values.numel()


def test_indices_are_as_short_as_the_weight_lets_them_be() -> None:
    assert index_dtype((2**16, 2**15 - 1)) is torch.int32 and index_dtype((2**16, 2**15)) is torch.int64


def test_a_value_of_zero_leaves_the_base_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 1.0], dtype=torch.bfloat16)
    assert torch.equal(added(base, torch.zeros(2)).view(torch.int16), base.view(torch.int16))
    assert added(base, torch.tensor([0.0, 1.0])).tolist() == [0.0, 2.0]
