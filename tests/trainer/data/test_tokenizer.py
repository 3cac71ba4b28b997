"""Tokenizers: bytes, and Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.harness.models import save_tiny_model
from tests.trainer.data.families import TOKENIZERS
from trainer.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from trainer.errors import Refused
from trainer.models import load_tokenizer
from trainer.options.model import HuggingFace

LOSSLESS = [name for name in TOKENIZERS if name != "word pieces"]
MADE = {name: HuggingFaceTokenizer(make()) for name, make in TOKENIZERS.items()}
# What tokenizers are said to get wrong: blanks at edges and in rows, letters of several bytes, and all else.
TEXTS = st.lists(
    st.sampled_from([" ", "  ", "\n", "a", "cat", " the", "é", "🙂", "日本", "\t", "2+2"]), max_size=12
).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    clean = text.encode("utf-8", "replace").decode()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == clean


def test_ids_beyond_bytes_are_left_out() -> None:
    assert ByteTokenizer().decode([72, 300, 105]) == "Hi"


def test_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    tokenizer = load_tokenizer(HuggingFace(path=str(tmp_path)))
    ids = tokenizer.encode("def main(): return 1")
    assert len(ids) > 0 and tokenizer.eos not in ids.tolist()
    assert tokenizer.decode(ids.tolist()) == "def main(): return 1"


def test_bytes_are_a_tokenizer_of_transformers_too(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f():\n\treturn 'é ü 漢'  # \x7f", " two  blanks\r\n", "\0"):
        ids = saved(text)["input_ids"]
        assert ids == list(text.encode()) and saved.decode(ids) == text


@pytest.mark.parametrize("family", LOSSLESS)
@settings(max_examples=60)
@given(text=TEXTS)
def test_what_a_family_reads_it_writes(family: str, text: str) -> None:
    """Neither a blank more nor one less, and what marks the start stands there once."""
    tokenizer = MADE[family]
    ids = tokenizer.encode(text).tolist()
    written = tokenizer.decode(ids)
    assert written == text or (drops_blanks(family) and written.lstrip(" ") == text.lstrip(" "))
    start = tokenizer.id_of("<s>") if "<s>" in tokenizer.specials else None
    assert ids.count(start) == int("start" in family or family in STARTS)


def drops_blanks(family: str) -> bool:
    """Whether it takes blanks at the start of a text for the one that it would put there, as Metaspace does."""
    return family in ("metaspace, always", "metaspace, first")


STARTS = ("byte-level, trimmed offsets", "metaspace, always", "metaspace, never", "a blank before all")


@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_start_or_an_end_that_the_text_has_is_not_given_twice(family: str) -> None:
    tokenizer = MADE[family]
    plain = tokenizer.encode("the cat").tolist()
    if "<s>" in tokenizer.specials:
        with_start = tokenizer.encode("<s>the cat").tolist()
        assert with_start.count(tokenizer.id_of("<s>")) == 1
        if plain[0] == tokenizer.id_of("<s>"):
            assert tokenizer.decode(with_start) == tokenizer.decode(plain)
    with_end = tokenizer.encode("the cat</s>").tolist()
    assert tokenizer.eos not in with_end and tokenizer.decode(with_end) == "the cat"


def test_without_offsets_it_is_said() -> None:
    with pytest.raises(Refused, match="does not tell which characters a token comes from"):
        MADE["without offsets"].encode_at("a")
