"""Whole heads, and anything else that is counted, shared out to ranks that they need not divide by. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from checkpointing import Interval
from trainer.errors import Refused


@dataclass(frozen=True)
class Share:
    """The query and key-value heads of one rank, as ranges of the model's, of `head_size` elements each.

    Where there are fewer key-value heads than ranks, several ranks hold a copy of one, and `first` is one of them.
    """

    heads: Interval
    kv_heads: Interval
    num_heads: int
    num_kv_heads: int
    head_size: int
    first: bool


def share_of(num_heads: int, num_kv_heads: int, head_size: int, size: int, at: int) -> Share:
    """Rank `at` of `size`. `Refused` where a rank would be left without a head."""
    group = num_heads // num_kv_heads  # query heads that one key-value head serves
    if num_kv_heads >= size:
        start, length = balanced(num_kv_heads, size, at)
        return Share((start * group, length * group), (start, length), num_heads, num_kv_heads, head_size, True)
    mine = at * num_kv_heads // size
    sharing = [rank for rank in range(size) if rank * num_kv_heads // size == mine]
    if group < len(sharing):
        raise Refused(
            f"parallel.tp={size} is more than the model's {num_heads} heads with {num_kv_heads} for keys and values "
            f"can be split into. Type parallel.tp={num_heads if num_kv_heads == 1 else num_kv_heads}."
        )
    start, length = balanced(group, len(sharing), sharing.index(at))
    return Share((mine * group + start, length), (mine, 1), num_heads, num_kv_heads, head_size, first=at == sharing[0])


def balanced(count: int, size: int, at: int) -> Interval:
    """Share `at` of `size`; the first ones are larger where the count does not divide."""
    length, more = divmod(count, size)
    return at * length + min(at, more), length + (at < more)
