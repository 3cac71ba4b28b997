"""Records to samples: texts, and prompts with completions. Conversations are in conversations.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

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

    def notes(self) -> list[str]:
        """What had to be cut or left out so far."""


class Fields:
    """Records with a text, or with a prompt and its completion, under the names that are given."""

    def __init__(self, text: str, prompt: str, completion: str, tokenizer: Tokenizer, seq_len: int) -> None:
        self.text, self.prompt, self.completion = text, prompt, completion
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.tally: Counter[str] = Counter()

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
        return found

    def samples(self, where: str, record: Record) -> list[Sample]:
        if self.prompt in record and self.completion in record:
            return self._pair(*(string(record, key, where) for key in (self.prompt, self.completion)))
        if self.text in record:
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
        """A prompt, without loss, and its completion with its end. The completion has the first claim to the room."""
        if not completion:
            self.tally["empty"] += 1
            return []
        given = self.tokenizer.encode(prompt)
        wanted = append(self.tokenizer.encode(completion, start=len(given) == 0), self.tokenizer.eos)
        if len(given) + len(wanted) > self.seq_len + 1:
            self.tally["truncated"] += 1
        wanted = wanted[: self.seq_len]
        given = given[max(0, len(given) - (self.seq_len + 1 - len(wanted))) :]
        if len(given) == 0 and len(wanted) < 2:  # seq_len is 1: nothing precedes the only token
            self.tally["empty"] += 1
            return []
        return [predicted(np.concatenate([given, wanted]), len(given))]


def conversational(record: Record) -> bool:
    """Whether a record looks like one that data=chat reads."""
    return "messages" in record or "conversations" in record or {"instruction", "output"} <= set(record)


def string(record: Record, key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise Refused(f"{where}: the field {key} is a {type(value).__name__}, not a text. Mend or remove it.")
    return value


def append(tokens: Tokens, token: int) -> Tokens:
    return np.append(tokens, np.asarray([token], dtype=tokens.dtype))
