"""Datasets and batches: what is a target, what is padding, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.dataset import IGNORE, Batch, Records, Sample, Windows, collate, predicted


@given(st.integers(0, 60), st.integers(1, 9))
def test_windows_predict_every_token_but_the_first_once(length: int, seq_len: int) -> None:
    tokens = np.arange(length, dtype=np.int32)
    windows = Windows(tokens, seq_len)
    targets = [t for i in range(len(windows)) for t in windows.sample(i)[0][1:].tolist()]
    assert targets == list(range(1, length))
    ids = np.arange(len(windows))
    assert windows.num_targets(ids) == windows.num_tokens(ids) == max(0, length - 1)


records = st.lists(st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), min_size=1)


@given(records)
def test_records_count_what_they_hold(shape: list[tuple[int, int]]) -> None:
    dataset = Records([predicted(np.arange(n, dtype=np.int32), first) for n, first in shape], seq_len=11)
    ids = np.arange(len(dataset))
    batch = collate(dataset, ids, pad=99)
    assert dataset.num_targets(ids) == int((batch.labels != IGNORE).sum()) == sum(n - first for n, first in shape)
    assert dataset.num_tokens(ids) == sum(n - 1 for n, _ in shape)


def test_labels_are_the_next_tokens_with_the_prompt_masked() -> None:
    dataset = Records([predicted(np.array([5, 6, 7, 8]), 2), predicted(np.array([1, 2]))], seq_len=8)
    batch = collate(dataset, np.array([0, 1]), pad=0)
    assert batch.inputs.tolist() == [[5, 6, 7], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 7, 8], [2, IGNORE, IGNORE]]


def test_parts_of_a_batch_are_padded_as_the_whole() -> None:
    dataset = Windows(np.arange(60, dtype=np.uint8), 8)
    batch = collate(dataset, np.array([0, 3, 7, 2, 5]), pad=0)
    parts = list(batch.split(2))
    assert [len(p.inputs) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.inputs for p in parts]), batch.inputs)
    assert np.concatenate([p.ids for p in parts]).tolist() == batch.ids.tolist()
    assert [p.inputs.shape for p in batch.split(None)] == [(5, 8)]


@given(st.integers(1, 3), st.integers(1, 9))
def test_a_widened_batch_has_more_of_what_does_not_count(rows: int, width: int) -> None:
    inputs = torch.ones(rows, width, dtype=torch.int64)
    positions = torch.arange(width).repeat(rows, 1)
    for batch in (Batch(inputs, inputs, np.arange(rows)), Batch(inputs, inputs, np.arange(rows), positions)):
        wide = batch.widened(3, 9)
        assert wide.inputs.shape == wide.labels.shape == (3, 9)
        assert int((wide.labels >= 0).sum()) == rows * width == int(wide.inputs.sum())
    # What is added is a sample of its own, which no other sees.
    expected = [[*range(width), *range(9 - width)]] * rows + [list(range(9))] * (3 - rows)
    assert wide.positions is not None and wide.positions.tolist() == expected


def test_without_targets_nothing_counts() -> None:
    batch = collate(Windows(np.arange(60, dtype=np.uint8), 8), np.array([1]), pad=0).without_targets()
    assert (batch.labels == IGNORE).all() and len(batch.ids) == 0


def test_fingerprints_follow_content_and_cut() -> None:
    tokens = np.arange(50, dtype=np.int32)
    changed = tokens.copy()
    changed[30] += 1
    prints = [Windows(tokens, 8), Windows(tokens, 9), Windows(changed, 8), Windows(tokens.astype(np.int64), 8)]
    halves, hole = [predicted(tokens[:20]), predicted(tokens[20:])], [Sample(tokens, np.arange(50) % 7 > 2)]
    prints += [Records(samples, 8) for samples in ([predicted(tokens)], [predicted(tokens, 2)], halves, hole)]
    assert len({d.fingerprint for d in prints}) == len(prints)
    # Prompts with completions have the fingerprint that they always had, so that runs of earlier releases go on.
    assert Records([predicted(tokens, 2)], 8).fingerprint == "ae10a0ca8be113d785aea80c1bf0b007"
    assert Windows(tokens.copy(), 8).fingerprint == Windows(tokens, 8).fingerprint


@pytest.mark.parametrize("dataset", [Windows(np.zeros(0, np.uint8), 4), Records([], 4)])
def test_empty_datasets(dataset: Windows | Records) -> None:
    assert len(dataset) == 0 and dataset.largest_token == 0
