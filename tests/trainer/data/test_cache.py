"""Tokenized once and mapped: the same samples as without, by several processes, interrupted, damaged, at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness.models import tokenizer
from tests.harness.worlds import SharedWorld
from trainer.data import cache
from trainer.data.sources import Corpus, load_corpus
from trainer.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from trainer.errors import Refused
from trainer.options.data import Chat, Data, Hub, Jsonl

SEQ_LEN = 120


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART", 7)


def chats(path: Path, count: int = 40) -> Path:
    turns = [{"role": "user", "content": "two plus"}, {"role": "assistant", "content": "four"}]
    lines = [{"messages": [{**turn, "content": f"{turn['content']} {n}"} for turn in turns]} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pairs(path: Path, count: int = 40) -> Path:
    lines = [{"prompt": "p" * (n % 5), "completion": f"{n}" * (n % 9)} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def both(config: Data, directory: Path) -> tuple[Corpus, Corpus]:
    own = HuggingFaceTokenizer(tokenizer())
    plain = load_corpus(config, own, SEQ_LEN)
    config.cache = str(directory)  # type: ignore[attr-defined]
    return plain, load_corpus(config, own, SEQ_LEN)


def assert_same(a: Corpus, b: Corpus) -> None:
    assert (a.train.fingerprint, a.held_out.fingerprint, a.notes) == (
        b.train.fingerprint,
        b.held_out.fingerprint,
        b.notes,
    )
    for index in range(len(a.train)):
        for one, other in zip(a.train.sample(index), b.train.sample(index), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_what_it_would_be_without(tmp_path: Path, workers: int) -> None:
    import datasets

    datasets.Dataset.from_list([{"text": f"line {n}"} for n in range(30)]).save_to_disk(tmp_path / "saved")
    options: dict[str, Any] = {"eval_fraction": 0.3, "workers": workers}
    for config in (
        Chat(path=str(chats(tmp_path / "chats")), template="chatml", **options),
        Jsonl(path=str(pairs(tmp_path / "pairs")), **options),
        Jsonl(path=str(pairs(tmp_path / "pairs")), eval_path=str(pairs(tmp_path / "apart", 9)), **options),
        Hub(path=str(tmp_path / "saved"), **options),
    ):
        plain, kept = both(config, tmp_path / "cache")
        assert_same(plain, kept)
        assert isinstance(kept.train._tokens, np.memmap) and len(kept.held_out)
    places = list((tmp_path / "cache").iterdir())
    assert len(places) == 4 and not list((tmp_path / "cache").rglob("part-*"))


def test_what_samples_follow_from_is_in_the_key(tmp_path: Path) -> None:
    path, place = chats(tmp_path / "chats"), tmp_path / "cache"

    def read(template: str = "chatml", seq_len: int = SEQ_LEN, fraction: float = 0.1, own: Any = None) -> None:
        config = Chat(path=str(path), template=template, cache=str(place), eval_fraction=fraction, workers=1)
        load_corpus(config, own or ByteTokenizer(), seq_len)

    read()
    read()
    assert len(list(place.iterdir())) == 1
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}")
    changes: list[dict[str, Any]] = [{"seq_len": 110}, {"fraction": 0.2}, {"own": HuggingFaceTokenizer(tokenizer())}]
    for number, change in enumerate([*changes, {"template": str(tmp_path / "other.jinja")}], start=2):
        read(**change)
        assert len(list(place.iterdir())) == number, change
    chats(path, 41)
    read()
    assert len(list(place.iterdir())) == 6


def test_interrupted_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Jsonl(path=str(pairs(tmp_path / "pairs")), cache=str(tmp_path / "cache"), workers=1)
    worked, work = list[int](), cache._work

    def stop_after_three(place: Path, number: int, rows: Any) -> None:
        if len(worked) == 3:
            raise KeyboardInterrupt
        worked.append(number)
        work(place, number, rows)

    monkeypatch.setattr(cache, "_work", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(config, ByteTokenizer(), SEQ_LEN)
    assert worked == [0, 1, 2] and len(list(tmp_path.rglob("part-*.npz"))) == 3
    monkeypatch.setattr(cache, "_work", lambda place, number, rows: (worked.append(number), work(place, number, rows)))
    part = next(tmp_path.rglob("part-000001.npz"))  # as where the machine went down with it
    part.write_bytes(part.read_bytes()[:-40])
    kept = load_corpus(config, ByteTokenizer(), SEQ_LEN)
    assert worked == [0, 1, 2, 1, 3, 4, 5]  # none twice but that
    assert_same(load_corpus(Jsonl(path=config.path), ByteTokenizer(), SEQ_LEN), kept)


def test_damaged_it_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Jsonl(path=str(pairs(tmp_path / "pairs")), cache=str(tmp_path / "cache"), workers=1)
    expected = load_corpus(config, ByteTokenizer(), SEQ_LEN)
    file = next(tmp_path.rglob("train-tokens.npy"))
    content = file.read_bytes()
    for damage in (content[:-1], content[:20], b"", content[:-1] + b"x"):
        os.unlink(file)  # what is mapped stays
        file.write_bytes(damage)
        assert_same(expected, load_corpus(config, ByteTokenizer(), SEQ_LEN))
        assert "is damaged" in caplog.text
        caplog.clear()


@pytest.mark.usefixtures("processes")
def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Jsonl(path=str(pairs(tmp_path / "pairs")), cache=str(tmp_path / "file"), workers=1)
    with pytest.raises(Refused, match=r"data\.cache=.*file cannot be used: .* data\.cache=null"):
        load_corpus(config, ByteTokenizer(), SEQ_LEN)
    lines = [*pairs(tmp_path / "pairs").read_text().splitlines(), '{"other": 1}']
    (tmp_path / "wrong").write_text("\n".join(lines))
    for workers in (1, 2):
        config = Jsonl(path=str(tmp_path / "wrong"), cache=str(tmp_path / "cache"), workers=workers)
        with pytest.raises(Refused, match=r"wrong, line 41 has the fields \['other'\]"):
            load_corpus(config, ByteTokenizer(), SEQ_LEN)


def read(config: Jsonl) -> tuple[str, int]:
    made: list[int] = []
    make = cache._make

    def counted(place: Path, rows: Iterable[Any], *rest: Any) -> None:
        made.append(1)
        make(place, rows, *rest)

    cache._make = counted
    try:
        return load_corpus(config, ByteTokenizer(), SEQ_LEN).train.fingerprint, len(made)
    finally:
        cache._make = make


def test_of_many_processes_one_makes_it(tmp_path: Path, world: SharedWorld) -> None:
    config = Jsonl(path=str(pairs(tmp_path / "pairs", 500)), cache=str(tmp_path / "cache"), workers=1)
    found = world.run(read, 3, config, environment=True)
    assert len({fingerprint for fingerprint, _ in found}) == 1 and sum(made for _, made in found) == 1
