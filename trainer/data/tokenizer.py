"""Text to token ids and back: one token a byte, or a Hugging Face tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
import xxhash
from transformers import PreTrainedTokenizerFast

from trainer.errors import Refused

Tokens = npt.NDArray[np.integer[Any]]
Spans = npt.NDArray[np.integer[Any]]  # of shape [tokens, 2]: from, and up to


class Tokenizer(Protocol):
    eos: int  # ends a document, and pads
    unit: str  # what one token is called where a loss is printed
    chat_template: str | None  # Jinja, as transformers has it
    named_specials: Mapping[str, str]  # such as bos_token, as templates call them
    specials: tuple[str, ...]  # tokens that stand for no text

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same tokens."""

    def encode(self, text: str, *, start: bool = True) -> Tokens:
        """The tokens of a text; `start` puts in front whatever the model expects there."""

    def encode_at(self, text: str) -> tuple[Tokens, Spans]:
        """The tokens of a text that has special tokens in it as text, and the characters that each comes from."""

    def decode(self, tokens: Sequence[int], *, specials: bool = False) -> str: ...

    def save(self, directory: Path) -> None:
        """What transformers loads the same tokens with."""


class ByteTokenizer:
    """The UTF-8 bytes of a text. NUL, which text does not contain, ends a document."""

    eos = 0
    unit = "byte"
    chat_template: str | None = None
    named_specials: Mapping[str, str] = {}
    specials: tuple[str, ...] = ()
    fingerprint = "bytes"

    def encode(self, text: str, *, start: bool = True) -> Tokens:
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)

    def encode_at(self, text: str) -> tuple[Tokens, Spans]:
        widths = [len(character.encode("utf-8", "replace")) for character in text]
        starts = np.repeat(np.arange(len(text)), widths)
        return self.encode(text), np.stack([starts, starts + 1], axis=1)

    def decode(self, tokens: Sequence[int], *, specials: bool = False) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        # Byte-level tokenizers write bytes as letters: those that print as themselves, and others from 256 on.
        prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in prints]
        vocabulary = {chr(byte if byte in prints else 256 + others.index(byte)): byte for byte in range(256)}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False).save_pretrained(directory)


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library."""

    unit = "token"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self.eos: int = end if end is not None else tokenizer.pad_token_id
        self.named_specials: Mapping[str, str] = tokenizer.special_tokens_map
        self.specials: tuple[str, ...] = tuple(tokenizer.all_special_tokens) + tuple(
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        try:
            self.chat_template: str | None = tokenizer.get_chat_template()
        except ValueError:  # none, or several of which none is the default
            self.chat_template = None

    @property
    def fingerprint(self) -> str:
        fast = self._tokenizer.is_fast
        held = self._tokenizer.backend_tokenizer.to_str() if fast else sorted(self._tokenizer.get_vocab().items())
        told = [type(self._tokenizer).__name__, held, self.eos, self.specials, dict(self.named_specials)]
        return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True, default=str).encode())

    def encode(self, text: str, *, start: bool = True) -> Tokens:
        # Not every tokenizer that puts a start token in front also leaves the end alone.
        ids = self._tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"]
        if ids and ids[-1] == self.eos:
            ids = ids[:-1]
        return np.asarray(ids, dtype=np.int32)

    def encode_at(self, text: str) -> tuple[Tokens, Spans]:
        if not self._tokenizer.is_fast:
            raise Refused(
                f"{type(self._tokenizer).__name__} does not tell which characters a token comes from, which data=chat "
                "needs. Save the model with a fast tokenizer (a tokenizer.json)."
            )
        made = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return np.asarray(made["input_ids"], dtype=np.int32), np.asarray(made["offset_mapping"]).reshape(-1, 2)

    def decode(self, tokens: Sequence[int], *, specials: bool = False) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=not specials))

    def save(self, directory: Path) -> None:
        self._tokenizer.save_pretrained(directory)
