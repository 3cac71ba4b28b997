"""Sources: real text, records of any length, and everything that can be wrong with a file."""

from __future__ import annotations

import contextlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.dataset import IGNORE, collate
from trainer.data.sources import STDLIB_HELD_OUT_BYTES, STDLIB_LEFT_OUT, Corpus, held_out_files, load_corpus
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import Refused
from trainer.options.data import Jsonl, Stdlib, Text

BYTES = ByteTokenizer()


def text_of(corpus: Corpus) -> str:
    tokens = np.concatenate([corpus.train.sample(i)[0][:-1] for i in range(len(corpus.train))])
    return BYTES.decode(tokens.tolist())


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus(Stdlib(), BYTES, 128)


def test_the_standard_library_is_real_text_with_a_part_held_out(stdlib: Corpus) -> None:
    assert len(stdlib.held_out) * 128 >= STDLIB_HELD_OUT_BYTES
    assert len(stdlib.train) > 5 * len(stdlib.held_out)
    text = text_of(stdlib)
    assert "class OrderedDict" in text and "\nimport " in text
    again = load_corpus(Stdlib(), BYTES, 128)
    assert again.train.fingerprint == stdlib.train.fingerprint


def test_nothing_held_out_is_trained_on(stdlib: Corpus) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py") if not STDLIB_LEFT_OUT & set(p.parts)}
    held_out = held_out_files({name: p.stat().st_size for name, p in files.items()})
    text = text_of(stdlib)
    bodies = [files[name].read_text("utf-8", "replace") for name in sorted(held_out)]
    assert sum(len(body) for body in bodies) >= STDLIB_HELD_OUT_BYTES * 0.99
    assert not any(body in text for body in bodies if len(body) > 200)
    assert not any(f"{name}/" in name_ for name in ("encodings", "test", "idlelib", "pydoc_data") for name_ in held_out)


def test_what_is_held_out_follows_from_names_alone() -> None:
    sizes = {f"a{n}.py": 40_000 for n in range(100)}
    chosen = held_out_files(sizes)
    assert len(chosen) == 7  # the first to reach 256 KiB
    assert held_out_files(dict(reversed(sizes.items()))) == chosen
    assert held_out_files({**sizes, **{f"b{n}.py": 40_000 for n in range(100)}}) != chosen  # not the first few


def test_text_of_a_file_and_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 100)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("x" * 50)
    (tmp_path / "c.md").write_text("not matched")
    one = load_corpus(Text(path=str(tmp_path / "a.txt"), eval_fraction=0.1), BYTES, 16)
    assert text_of(one) == ("abc" * 100)[:270] and len(one.held_out) == 2
    every = load_corpus(Text(path=str(tmp_path), eval_fraction=0.0), BYTES, 16)
    assert text_of(every) == "abc" * 100 + "\0" + "x" * 50
    assert every.notes == ["nothing is held out, so there is no evaluation"]
    separate = load_corpus(Text(path=str(tmp_path / "a.txt"), eval_path=str(tmp_path / "sub")), BYTES, 16)
    assert text_of(separate) == "abc" * 100


def jsonl(tmp_path: Path, *lines: object, **options: object) -> Jsonl:
    path = tmp_path / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return Jsonl(path=str(path), **{"eval_fraction": 0.0, **options})  # type: ignore[arg-type]


def sample_of(corpus: Corpus, index: int) -> tuple[str, str]:
    """The tokens of a sample, and those of them that are targets."""
    tokens, targets = corpus.train.sample(index)
    return BYTES.decode(tokens.tolist()), BYTES.decode(tokens[targets].tolist())


def test_prompts_are_masked_and_completions_end(tmp_path: Path) -> None:
    corpus = load_corpus(jsonl(tmp_path, {"prompt": "2+2=", "completion": "4"}), BYTES, 16)
    assert sample_of(corpus, 0) == ("2+2=4\0", "4\0")
    batch = collate(corpus.train, np.array([0]), 0)
    assert batch.labels.tolist() == [[IGNORE] * 3 + [ord("4"), 0]]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=30), st.text(min_size=1, max_size=30)), min_size=1), st.integers(1, 20))
def test_every_record_gives_one_to_seq_len_targets(tmp_path: Path, pairs: list[tuple[str, str]], seq_len: int) -> None:
    config = jsonl(tmp_path, *({"prompt": p, "completion": c} for p, c in pairs))
    try:
        corpus = load_corpus(config, BYTES, seq_len)
    except Refused:
        assert seq_len == 1  # with one target, an empty prompt leaves nothing to predict it from
        return
    for i in range(len(corpus.train)):
        tokens, targets = corpus.train.sample(i)
        assert 2 <= len(tokens) <= seq_len + 1
        assert 1 <= targets.sum() <= seq_len and not targets[0]


def test_held_out_by_content_keeps_duplicates_on_one_side(tmp_path: Path) -> None:
    lines = [{"text": f"record {n % 100}"} for n in range(300)]
    corpus = load_corpus(jsonl(tmp_path, *lines, eval_fraction=0.3), BYTES, 32)
    train = {sample_of(corpus, i)[0] for i in range(len(corpus.train))}
    held_out = {BYTES.decode(corpus.held_out.sample(i)[0].tolist()) for i in range(len(corpus.held_out))}
    assert train and held_out and not train & held_out
    assert len(corpus.train) + len(corpus.held_out) == 300


def test_blank_lines_and_empty_records_are_left_out_and_said(tmp_path: Path) -> None:
    corpus = load_corpus(
        jsonl(tmp_path, "", {"text": ""}, "  ", {"prompt": "x", "completion": ""}, {"text": "ab"}), BYTES, 8
    )
    assert len(corpus.train) == 1
    assert "2 empty records are left out" in corpus.notes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ("[1]", "line 2 is a list, not an object"),
        ('{"body": "a"}', r"line 2 has the fields \['body'\], but neither text nor prompt and completion"),
        ('{"text": 3}', "line 2: the field text is a number, not a text"),
        ('{"prompt": "a"}', "neither text nor prompt and completion"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        load_corpus(jsonl(tmp_path, {"text": "fine"}, line), BYTES, 8)


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    config = jsonl(tmp_path, {"text": "fine"})
    Path(config.path).write_bytes(b'{"text": "fine"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(Refused, match="line 2 is not JSON"):
        load_corpus(config, BYTES, 8)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b'{"text": "abc"}', b'{"prompt": "a", "completion": "b"}'])))
def test_any_file_is_read_or_refused(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    with contextlib.suppress(Refused):
        load_corpus(Jsonl(path=str(path)), BYTES, 8)


@pytest.mark.parametrize("config", [Text, Jsonl])
def test_missing_and_empty_data_is_refused(tmp_path: Path, config: type) -> None:
    with pytest.raises(Refused, match=r"data\.path=.*absent does not exist"):
        load_corpus(config(path=str(tmp_path / "absent")), BYTES, 8)
    empty = tmp_path / "empty"
    empty.write_text("")
    with pytest.raises(Refused, match="holds nothing to train on"):
        load_corpus(config(path=str(empty)), BYTES, 8)


def test_a_directory_without_matches_and_a_directory_for_jsonl(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"matches data\.pattern"):
        load_corpus(Text(path=str(tmp_path)), BYTES, 8)
    with pytest.raises(Refused, match="is not a file"):
        load_corpus(Jsonl(path=str(tmp_path)), BYTES, 8)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    with pytest.raises(Refused, match=r"latin\.txt is not UTF-8: byte 3 is 0xe9"):
        load_corpus(Text(path=str(tmp_path)), BYTES, 8)


@pytest.mark.parametrize("pattern", ["/etc/*", "a/**b", ""])
def test_a_pattern_that_is_none_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(Refused):
        load_corpus(Text(path=str(tmp_path), pattern=pattern), BYTES, 8)


def test_a_file_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(Refused, match="/proc/self/mem cannot be read"):
        load_corpus(Jsonl(path="/proc/self/mem"), BYTES, 8)


def test_packed_rows_are_trained_on_and_what_is_held_out_stays_as_it_is(tmp_path: Path) -> None:
    lines = [{"text": "abc"}] * 8 + [{"text": "held out"}]
    loose = load_corpus(jsonl(tmp_path, *lines), BYTES, 16)
    packed = load_corpus(jsonl(tmp_path, *lines, pack=True), BYTES, 16)
    assert (len(loose.train), len(packed.train)) == (9, 3)  # of 3 and of 8 inputs
    assert "9 samples in 3 rows that are 67% full (22% with one in each)" in packed.notes
    assert packed.held_out.fingerprint == loose.held_out.fingerprint


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"messages": []}\n{"messages": []}', "chat"),
        ('[\n {"instruction": "i", "output": "o"}]', "chat"),
        ('{"prompt": "p", "completion": "c"}', "jsonl"),
        ('{"text": "t"}', "jsonl"),
    ],
)
def test_records_are_not_taken_for_text(text: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(Refused, match=f"holds records of .* and not text. Type data={kind}"):
        load_corpus(Text(path=str(path)), BYTES, 4)
    path.write_text('{"name": "a configuration", "text": 3}')
    assert load_corpus(Text(path=str(path), eval_fraction=0), BYTES, 4).train


def test_why_nothing_is_left_is_said(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(Refused, match=r"holds nothing to train on: 1 empty records are left out\. Mend the records"):
        load_corpus(Jsonl(path=str(path)), BYTES, 4)
    path.write_text("")
    with pytest.raises(Refused, match="holds nothing to train on: it is empty"):
        load_corpus(Jsonl(path=str(path)), BYTES, 4)
