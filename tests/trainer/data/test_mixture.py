"""Mixtures: every sample at least once an epoch, and each source in its share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.dataset import Records, predicted
from trainer.data.mixture import Mixture, counts_of
from trainer.data.sources import load_corpus
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import Refused
from trainer.options.data import Mix

sizes_and_shares = st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 10)), min_size=1, max_size=4)


@given(sizes_and_shares)
def test_shares_are_kept_and_nothing_is_left_out(given_: list[tuple[int, float]]) -> None:
    sizes, shares = [size for size, _ in given_], [share for _, share in given_]
    counts = counts_of(sizes, shares)
    assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))  # as short as can be
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - sum(counts) * share / sum(shares)) <= len(sizes) + 1


def part(first: int, count: int) -> Records:
    return Records([predicted(np.array([first, first + n, 1, 2][: 2 + n % 3])) for n in range(count)], 8)


def test_every_id_is_a_sample_of_its_source() -> None:
    a, b = part(10, 4), part(50, 3)
    mixed = Mixture([a, b], [4, 7])
    ids = np.arange(len(mixed))
    assert len(mixed) == 11
    seen = Counter(tuple(mixed.sample(int(i)).tokens.tolist()) for i in ids)
    assert [seen[tuple(a.sample(i).tokens.tolist())] for i in range(4)] == [1] * 4
    assert sorted(seen[tuple(b.sample(i).tokens.tolist())] for i in range(3)) == [2, 2, 3]
    assert mixed.num_tokens(ids) == sum(mixed.num_tokens(ids[i : i + 1]) for i in ids)
    assert mixed.num_targets(ids) == sum(int(mixed.sample(int(i)).targets.sum()) for i in ids)
    prints = {
        Mixture([a, b], [4, 7]).fingerprint,
        Mixture([a, b], [4, 8]).fingerprint,
        Mixture([b, a], [4, 7]).fingerprint,
    }
    assert len(prints) == 3 and mixed.fingerprint in prints and mixed.largest_token == b.largest_token


def test_sources_of_several_kinds_at_their_shares(tmp_path: Path) -> None:
    talk = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(n)}]} for n in range(20)
    ]
    (tmp_path / "talk@home.jsonl").write_text("".join(json.dumps(one) + "\n" for one in talk))
    (tmp_path / "book.txt").write_text("z" * 640)
    sources = [f"chat:{tmp_path}/talk@home.jsonl@3", f"text:{tmp_path}/book.txt"]
    config = Mix(sources=sources, template="chatml", eval_fraction=0.2)
    corpus = load_corpus(config, ByteTokenizer(), 64)
    texts = [bytes(corpus.train.sample(i).tokens.tolist()).startswith(b"zz") for i in range(len(corpus.train))]
    assert abs(sum(texts) / len(texts) - 0.25) < 0.05
    assert len(corpus.held_out) > 1 and any("75.0% of the samples" in note for note in corpus.notes)
    packed = load_corpus(Mix(sources=sources, template="chatml", pack=True), ByteTokenizer(), 64)
    assert packed.train.packs


@pytest.mark.parametrize("source", ["nowhere", "chat:", "chat:@2", "tape:x", "text:x@0", "text:x@-1", "text:x@nan"])
def test_what_is_no_source_is_refused(source: str) -> None:
    with pytest.raises(Refused, match=r"data\.sources: .* is no KIND:PATH@SHARE"):
        load_corpus(Mix(sources=[source]), ByteTokenizer(), 8)


def test_no_source_at_all() -> None:
    with pytest.raises(Refused, match="data=mix has no sources"):
        load_corpus(Mix(), ByteTokenizer(), 8)
