"""Shares of the global batch: together they are the same on any number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.dataset import IGNORE, Windows
from trainer.data.feed import Feed

DATASET = Windows(np.arange(1000, dtype=np.int32), 7)


def feed(num_ranks: int, rank: int, global_batch: int = 12, micro_batch: int = 3) -> Feed:
    return Feed(
        DATASET, global_batch=global_batch, micro_batch=micro_batch, seed=1, pad=0, num_ranks=num_ranks, rank=rank
    )


@given(st.integers(1, 7), st.integers(1, 200))
def test_shares_make_up_the_global_batch(num_ranks: int, step: int) -> None:
    alone = feed(1, 0).step(step)
    shares = [feed(num_ranks, rank).step(step) for rank in range(num_ranks)]
    parts = sorted((n, b.ids.tolist()) for share in shares for n, b in share.micro_batches if len(b.ids))
    assert parts == [(n, b.ids.tolist()) for n, b in alone.micro_batches]
    assert {(s.num_targets, s.num_tokens) for s in shares} == {(alone.num_targets, alone.num_tokens)}
    targets = sum(int((b.labels != IGNORE).sum()) for s in shares for _, b in s.micro_batches)
    assert targets == alone.num_targets


def test_idle_turns_have_inputs_but_no_targets() -> None:
    number, batch = feed(5, 4).step(1).micro_batches[0]
    assert number == 4 and batch.inputs.shape[0] == 3 and (batch.labels == IGNORE).all()


def test_the_held_out_set_is_covered_evenly_and_once() -> None:
    held_out = Windows(np.arange(300, dtype=np.int32), 7)
    for wanted, count in ((10, 10), (0, len(held_out)), (10**6, len(held_out))):
        shares = [feed(4, rank).evenly(held_out, wanted) for rank in range(4)]
        ids = sorted(i for s in shares for _, b in s.micro_batches for i in b.ids.tolist())
        assert len(ids) == len(set(ids)) == count
        assert ids[0] == 0 and ids[-1] == len(held_out) - 1
