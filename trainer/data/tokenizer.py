"""Text to token ids and back: one token a byte, or a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    eos: int  # ends a document, and pads
    unit: str  # what one token is called where a loss is printed

    def encode(self, text: str, *, start: bool = True) -> Tokens:
        """The tokens of a text; `start` puts in front whatever the model expects there."""

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """The UTF-8 bytes of a text. NUL, which text does not contain, ends a document."""

    eos = 0
    unit = "byte"

    def encode(self, text: str, *, start: bool = True) -> Tokens:
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library."""

    unit = "token"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self.eos: int = end if end is not None else tokenizer.pad_token_id

    def encode(self, text: str, *, start: bool = True) -> Tokens:
        # Not every tokenizer that puts a start token in front also leaves the end alone.
        ids = self._tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"]
        if ids and ids[-1] == self.eos:
            ids = ids[:-1]
        return np.asarray(ids, dtype=np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
