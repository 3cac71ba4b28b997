"""Texts, and prompts with completions: what is learned of them, and how they are cut."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.records import Fields
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import Refused

BYTES = ByteTokenizer()


def read(seq_len: int, *records: dict[str, Any], names: tuple[str, str, str] = ("text", "prompt", "completion")) -> Any:
    """The tokens of every sample and those that are learned, and what is said about all of them."""
    reader = Fields(*names, BYTES, seq_len)
    samples = [sample for record in records for sample in reader.samples("line 1", record)]
    texts = [(BYTES.decode(tokens.tolist()), BYTES.decode(tokens[targets].tolist())) for tokens, targets in samples]
    return texts, reader.notes()


def test_the_completion_has_the_first_claim_to_the_room() -> None:
    samples, notes = read(8, *({"prompt": "p" * 50, "completion": "c" * n} for n in (3, 7, 8, 60)))
    assert samples == [
        ("pppppccc\0", "ccc\0"),
        ("pccccccc\0", "ccccccc\0"),
        ("p" + "c" * 8, "c" * 8),
        ("p" + "c" * 8, "c" * 8),
    ]
    assert notes[0].startswith("4 records are longer than train.seq_len=8")


def test_long_documents_lose_nothing() -> None:
    document = "0123456789" * 5
    samples, _ = read(8, {"text": document})
    assert "".join(learned for _, learned in samples) == document[1:] + "\0"


def test_own_field_names() -> None:
    samples, _ = read(8, {"q": "x", "a": "y"}, {"body": "z"}, names=("body", "q", "a"))
    assert samples == [("xy\0", "y\0"), ("z\0", "\0")]


@pytest.mark.parametrize("record", [{"messages": []}, {"conversations": []}, {"instruction": "", "output": ""}])
def test_conversations_are_sent_where_they_are_read(record: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"line 1 has the fields .* Type data=chat for conversations, or name them"):
        read(8, record)
