"""Records to samples: texts, and prompts with completions. Conversations are in conversations.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any, Protocol

import numpy as np

from checkpointing.errors import first_few
from trainer.data.dataset import Sample, predicted
from trainer.data.tokenizer import Tokenizer, Tokens
from trainer.errors import Refused

Record = Mapping[str, Any]


class RecordReader(Protocol):
    tally: Counter[str]  # of what `notes` tells; those of several readers add up

    @property
    def key(self) -> str:
        """Equal for readers that make the same samples of the same records."""

    def samples(self, where: str, record: Record) -> list[Sample]:
        """None for a record that holds nothing to learn. `Refused` names `where` it is malformed."""

    @property
    def endings(self) -> Set[str]:
        """Tokens that end what was learned of conversations so far."""

    def notes(self) -> list[str]:
        """Notes on what had to be cut or left out so far."""


class Fields:
    """Records with a text, or with a prompt and its completion, under the names that are given."""

    def __init__(self, text: str, prompt: str, completion: str, tokenizer: Tokenizer, seq_len: int) -> None:
        self.text, self.prompt, self.completion = text, prompt, completion
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.tally: Counter[str] = Counter()
        self.endings: Set[str] = frozenset()

    @property
    def key(self) -> str:
        return str([self.text, self.prompt, self.completion, self.tokenizer.fingerprint, self.seq_len])

    def notes(self) -> list[str]:
        found = []
        if self.tally["truncated"]:
            found.append(
                f"{self.tally['truncated']} records are longer than train.seq_len={self.seq_len} and are cut, "
                "prompts first and from the left"
            )
        if self.tally["empty"]:
            found.append(f"{self.tally['empty']} empty records are left out")
        if self.tally["alone"]:
            found.append(
                f"{self.tally['alone']} records are left out: of them nothing but a first token has room in "
                f"train.seq_len={self.seq_len}, and that is predicted from nothing"
            )
        return [*found, *mendings(self.tally), *unread(self.tally)]

    def samples(self, where: str, record: Record) -> list[Sample]:
        record = mended(where, record, self.tally)
        check_learning(where, record)
        if self.prompt in record and self.completion in record:
            if more := [key for key in ("system", "history", "tools") if record.get(key)]:
                raise Refused(
                    f"{where} has {' and '.join(more)} beside its prompt, which texts have no place for. Put it into "
                    "the prompt, or give messages (data=chat)."
                )
            self.tally.update(UNREAD + key for key in record.keys() - {self.prompt, self.completion, *FLAGS})
            return self._pair(*(string(record, key, where) for key in (self.prompt, self.completion)))
        if self.text in record:
            self.tally.update(UNREAD + key for key in record.keys() - {self.text, *FLAGS})
            return self._document(string(record, self.text, where))
        hint = "Type data=chat for conversations, or name" if conversational(record) else "Name"
        raise Refused(
            f"{where} has the fields {sorted(record)}, but neither {self.text} nor {self.prompt} and "
            f"{self.completion}. {hint} them: data.text_field=..., or data.prompt_field=... and "
            "data.completion_field=..."
        )

    def _document(self, text: str) -> list[Sample]:
        """A document and its end; longer ones in consecutive samples, so that nothing is lost."""
        if not text:
            self.tally["empty"] += 1
            return []
        tokens = append(self.tokenizer.encode(text), self.tokenizer.eos)
        starts = range(0, len(tokens) - 1, self.seq_len)
        return [predicted(tokens[start : start + self.seq_len + 1]) for start in starts]

    def _pair(self, prompt: str, completion: str) -> list[Sample]:
        """A prompt, without loss, and its completion with its end. The completion has the first claim to the room.

        They are one text for the tokenizer, as they are for a model that goes on with the prompt; a token over the seam
        is the completion's.
        """
        if not completion:
            self.tally["empty"] += 1
            return []
        given, wanted = self._apart(prompt, completion)
        wanted = append(wanted, self.tokenizer.eos)
        if len(given) + len(wanted) > self.seq_len + 1:
            self.tally["truncated"] += 1
        wanted = wanted[: self.seq_len]
        given = given[max(0, len(given) - (self.seq_len + 1 - len(wanted))) :]
        if len(given) == 0 and len(wanted) < 2:
            self.tally["alone"] += 1
            return []
        return [predicted(np.concatenate([given, wanted]), len(given))]

    def _apart(self, prompt: str, completion: str) -> tuple[Tokens, Tokens]:
        if self.tokenizer.tells_spans:
            tokens, spans = self.tokenizer.encode_at(prompt + completion, start=True)
            first = int(np.argmax(np.append(spans[:, 1] > len(prompt), True)))
        else:
            tokens, alone = self.tokenizer.encode(prompt + completion), self.tokenizer.encode(prompt)
            common = min(len(tokens), len(alone))
            first = int(np.argmax(np.append(tokens[:common] != alone[:common], True)))
        return tokens[:first], tokens[first:]


def conversational(record: Record) -> bool:
    """Whether a record looks like one that data=chat reads."""
    listed = isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list)
    turns = record.get("messages") is not None or record.get("conversations") is not None
    return listed or turns or {"instruction", "output"} <= set(record)


# What is to be learned, as other trainers read it: flags of a record or a turn, and lists with an entry a token.
FLAGS = ("weight", "train", "training", "trainable", "loss")
MASKS = ("loss_mask", "assistant_masks", "completion_mask", "train_detail", "training_detail")


# Flags of a turn, or of a part of one, that trainers read in different ways.
AMBIGUOUS = ("mask", "masked", "ignore", "ignored", "skip", "prefix")


def check_flags(where: str, given: Record, what: str) -> None:
    """`Refused` where a turn, or a part of one, has a flag that is not read and that is no plain no."""
    for key in AMBIGUOUS:
        if (_is_flag(given.get(key)) or given.get(key) in (0, 1)) and given[key] not in (False, "false", "0"):
            raise Refused(
                f"{where}: {what} says {key}: {given[key]!r}, which is not read here. Remove it, and give a message "
                'that is not to be learned "weight": 0.'
            )


def is_learned(where: str, given: Record) -> bool | None:
    """Whether a turn's flags have it learned; None where there are none. `Refused` for what is neither yes nor no."""
    said = {key: given[key] for key in FLAGS if given.get(key) is not None}
    if wrong := [key for key, value in said.items() if not isinstance(value, int | float) or value not in (0, 1)]:
        raise Refused(
            f"{where}: {wrong[0]} is {said[wrong[0]]!r}, and something is learned (1, true) or not (0, false). Mend or "
            "remove it."
        )
    if len({bool(value) for value in said.values()}) > 1:
        raise Refused(f"{where}: {' and '.join(said)} contradict each other. Mend or remove one of them.")
    return bool(next(iter(said.values()))) if said else None


def check_learning(where: str, record: Record) -> None:
    """`Refused` where a record says something of what is to be learned that is not read.

    Columns that share a name with a flag and hold something else, such as a measured loss, are no such thing.
    """
    if record.get("chosen") is not None and record.get("rejected") is not None:
        raise Refused(
            f"{where} holds a choice between two answers (chosen, rejected), and one answer is what is learned from "
            "here. Keep it alone, as the completion of a prompt or as the last of messages."
        )
    label = record.get("label")
    if (_is_flag(label) or label in (0, 1)) and "prompt" in record and "completion" in record:
        raise Refused(
            f"{where} says whether its completion is a good one (label), and all completions are learned here. Leave "
            "the records out that are not, and the label."
        )
    if masks := [key for key in MASKS if isinstance(record.get(key), list)]:
        raise Refused(
            f"{where} says in {' and '.join(masks)} which part of it is to be learned, which is not read. Remove it, "
            'or give messages, where "weight": 0 leaves a turn out.'
        )
    said = {key: record[key] for key in FLAGS if _is_flag(record.get(key)) or record.get(key) in (0, 1)}
    if ("prompt" in record or conversational(record)) and isinstance(record.get("weight"), int | float):
        said["weight"] = record["weight"]
    if is_learned(where, said) is False:
        raise Refused(f"{where} says that it is not to be learned ({', '.join(said)}). Remove the record.")


def _is_flag(value: Any) -> bool:
    """Yes or no, also as a text, which `is_learned` refuses."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false", "0", "1"))


_HALF = re.compile("[\ud800-\udfff]")


def mended(where: str, record: Record, tally: Counter[str]) -> Record:
    """Replace each half of a surrogate pair, as of an emoji that was cut, by U+FFFD: no tokenizer reads halves."""
    halves = 0

    def mend(value: Any) -> Any:
        nonlocal halves
        if isinstance(value, str):
            if value.isascii() or not _HALF.search(value):
                return value
            halves += 1
            return _HALF.sub("\N{REPLACEMENT CHARACTER}", value)
        if isinstance(value, list):
            return [mend(one) for one in value]
        return {key: mend(one) for key, one in value.items()} if isinstance(value, Mapping) else value

    try:
        found = {key: mend(value) for key, value in record.items()}
    except RecursionError:
        raise Refused(f"{where} is nested too deeply to be a record. Mend or remove it.") from None
    tally["mended"] += halves > 0
    return found


def mendings(tally: Counter[str]) -> list[str]:
    if not tally["mended"]:
        return []
    return [f"{tally['mended']} records hold halves of characters (lone surrogates), which are read as U+FFFD"]


def string(record: Record, key: str, where: str) -> str:
    value = record[key]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "role" in one for one in value):
        raise Refused(f"{where}: the field {key} is a list of messages. Type data=chat, which reads those.")
    raise Refused(f"{where}: the field {key} is {kind_of(value)}, not a text. Mend or remove it.")


def kind_of(value: Any) -> str:
    """The name of a JSON value's kind."""
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


UNREAD = "unread:"  # of tallies: followed by the name of a field


def unread(tally: Counter[str]) -> list[str]:
    names = sorted(key.removeprefix(UNREAD) for key, count in tally.items() if key.startswith(UNREAD) and count)
    return [f"fields of records that are not read: {first_few(names)}"] if names else []


def append(tokens: Tokens, token: int) -> Tokens:
    return np.append(tokens, np.asarray([token], dtype=tokens.dtype))
