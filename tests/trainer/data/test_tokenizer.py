"""Tokenizers: bytes, and Hugging Face's."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.harness.models import save_tiny_model
from trainer.choices import HuggingFace
from trainer.data.tokenizer import ByteTokenizer
from trainer.models import load_tokenizer


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
