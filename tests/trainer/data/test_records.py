"""Texts, and prompts with completions: what is learned of them, and how they are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tests.trainer.data.families import TOKENIZERS
from tests.trainer.data.test_tokenizer import LOSSLESS, MADE, TEXTS, drops_blanks
from trainer.data.records import Fields, check_learning
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


@pytest.mark.parametrize("family", LOSSLESS)
@settings(max_examples=60)
@given(prompt=TEXTS, completion=TEXTS.filter(bool))
def test_a_pair_is_one_text_of_which_the_completion_is_learned(family: str, prompt: str, completion: str) -> None:
    """As many tokens as the text has and its end; learned is all of the completion, and of the prompt less than one."""
    tokenizer = MADE[family]
    reader = Fields("text", "prompt", "completion", tokenizer, 500)
    whole, first = tokenizer.encode(prompt + completion).tolist(), len(reader._apart(prompt, completion)[0])
    if len(whole) == 0:
        return
    ((tokens, targets),) = reader.samples("", {"prompt": prompt, "completion": completion})
    assert tokens.tolist() == [*whole, tokenizer.eos]
    assert np.flatnonzero(targets).tolist() == [*range(max(first, 1), len(tokens))]
    given = tokenizer.decode(whole[:first])
    assert prompt.startswith(given) or (drops_blanks(family) and prompt.lstrip(" ").startswith(given.lstrip(" ")))
    texts = (tokenizer.decode(whole[:end]) for end in range(first + 1, len(whole) + 1))
    further = next(text for text in (*texts, None) if text != given)  # some tokens are no whole letter
    assert further is None or not prompt.startswith(further) or prompt.strip(" ") == ""


def test_a_completion_has_no_blank_that_nobody_wrote() -> None:
    """The control: tokenized by itself it has one, in families that put one before every text."""
    for family in ("metaspace, always", "a blank before all"):
        tokenizer = MADE[family]
        ((tokens, targets),) = Fields("t", "p", "c", tokenizer, 50).samples("", {"p": "2+2 is", "c": "4."})
        learned = [tokenizer.decode([token], specials=True) for token in tokens[targets].tolist()]
        assert "".join(learned) == "4.</s>"
        apart = tokenizer._tokenizer("4.", add_special_tokens=False)["input_ids"]
        assert tokenizer._tokenizer.convert_ids_to_tokens(apart)[0].startswith("▁")


@pytest.mark.parametrize("family", TOKENIZERS)
def test_an_end_that_the_completion_has_is_not_given_twice(family: str) -> None:
    tokenizer = MADE[family]
    ((tokens, _),) = Fields("t", "p", "c", tokenizer, 50).samples("", {"p": "the ", "c": "cat</s>"})
    assert tokens.tolist().count(tokenizer.eos) == 1 and tokens[-1] == tokenizer.eos


def test_halves_of_characters_are_replaced_and_counted() -> None:
    for record in ({"text": "cut off \ud83d here"}, {"prompt": ["x"], "text": "\udc00"}):
        samples, notes = read(60, record)
        assert "\N{REPLACEMENT CHARACTER}" in samples[0][0]
        assert notes[:1] == ["1 records hold halves of characters (lone surrogates), which are read as U+FFFD"]
    assert read(60, {"text": "🙂 whole"})[1] == []


def test_a_first_token_alone_is_counted_for_what_it_is() -> None:
    _, notes = read(1, {"prompt": "", "completion": "c"})
    assert notes[-1:] == [
        "1 records are left out: of them nothing but a first token has room in train.seq_len=1, and that is predicted "
        "from nothing",
    ]


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth * 4):
        found = [found]
    return found


COLUMNS: list[dict[str, Any]] = [
    *({"labels": [0, 3]}, {"loss": 2.31}, {"weight": 0.8}, {"train": "yes"}, {"segments": [{}]}),
]


@pytest.mark.parametrize("more", COLUMNS)
def test_a_column_that_shares_a_name_with_a_flag_is_none(more: dict[str, Any]) -> None:
    assert read(8, {"text": "abc", **more})[0] == read(8, {"text": "abc"})[0]


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "null": ({"text": None}, "the field text is null, not a text"),
    "messages as a prompt": (
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        "the field prompt is a list of messages. Type data=chat",
    ),
    "a preference": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        r"a choice between two answers \(chosen, rejected\)",
    ),
    "a mask": ({"text": "abc", "loss_mask": [1, 0, 1]}, "says in loss_mask which part of it is to be learned"),
    "no part of it": ({"text": "abc", "train": False}, "says that it is not to be learned"),
    "half of it": ({"prompt": "a", "completion": "b", "weight": 0.5}, "weight is 0.5, and something is learned"),
    "whether it is good": (
        {"prompt": "a", "completion": "b", "label": False},
        "says whether its completion is a good",
    ),
    "a system text": ({"prompt": "a", "completion": "b", "system": "c"}, "has system beside its prompt"),
    "what is too deep": ({"text": "a", "more": nested(500)}, "is nested too deeply to be a record"),
    "contradictions": ({"text": "abc", "weight": 1, "train": False}, "weight and train contradict each other"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_said_of_learning_and_not_read_is_refused_by_its_line(case: str) -> None:
    record, message = REFUSALS[case]
    with pytest.raises(Refused, match=f"^line 1.*{message}"):
        read(8, record)
    assert read(8, {"text": "abc", "weight": 1, "train": True, "labels": 3, "rejected": None, "loss": None})[0]


@pytest.mark.parametrize(
    "said", [{"weight": 0.5}, {"weight": "0"}, {"train": "false"}, {"weight": 2}, {"trainable": "True"}], ids=str
)
def test_what_is_neither_yes_nor_no_is_refused_of_every_kind(said: dict[str, Any]) -> None:
    for record in ({"messages": []}, {"instruction": "i", "output": "o"}, {"prompt": "p", "completion": "c"}):
        with pytest.raises(Refused, match=r"something is learned \(1, true\) or not"):
            check_learning("line 1", {**record, **said})
    check_learning("line 1", {"text": "t", "loss": 0.7, "train": "first"})  # a measured loss, the name of a split


@pytest.mark.parametrize("label", [True, 0, 1, "false", "True"])
def test_a_judgement_of_a_completion_is_refused(label: Any) -> None:
    with pytest.raises(Refused, match="whether its completion is a good one"):
        read(60, {"prompt": "p", "completion": "c", "label": label})
    assert read(60, {"prompt": "p", "completion": "c", "label": "sports"})[0]


def test_fields_that_are_not_read_are_named() -> None:
    record = {"prompt": "p", "completion": "c", "suffix": "s", "id": 3, "weight": 1}
    assert read(60, record)[1] == ["fields of records that are not read: id, suffix"]
    assert read(60, {"prompt": "p", "completion": "c"})[1] == []
