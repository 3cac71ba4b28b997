"""Shares of heads and of anything else that is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import Refused
from trainer.parallel.shares import balanced, share_of


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 16))
def test_shares_hold_every_head_once_and_its_keys(group: int, kv: int, size: int) -> None:
    heads = group * kv
    try:
        shares = [share_of(heads, kv, 4, size, at) for at in range(size)]
    except Refused as refused:
        assert size > kv and "Type parallel.tp=" in str(refused)
        fitting = int(str(refused).split("Type parallel.tp=")[1].rstrip("."))
        assert all(share_of(heads, kv, 4, fitting, at) for at in range(fitting))  # what it says to type works
        return
    held = [head for share in shares for head in range(share.heads[0], sum(share.heads))]
    assert held == list(range(heads))
    counted = [head for s in shares if s.first for head in range(s.kv_heads[0], sum(s.kv_heads))]
    assert counted == list(range(kv))
    for share in shares:
        (start, length), (first, kv_length) = share.heads, share.kv_heads
        assert length > 0 and length % kv_length == 0  # the heads that one serves are as many for each
        serving = [first + n // (length // kv_length) for n in range(length)]
        assert serving == [head // group for head in range(start, start + length)]


@given(st.integers(0, 50), st.integers(1, 9))
def test_balanced_shares_follow_one_another(count: int, size: int) -> None:
    shares = [balanced(count, size, at) for at in range(size)]
    assert [n for start, length in shares for n in range(start, start + length)] == list(range(count))
    assert max(length for _, length in shares) - min(length for _, length in shares) <= 1
