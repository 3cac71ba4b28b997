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
    tool_template: str | None  # the one for conversations with tools, where that is another
    named_specials: Mapping[str, str]  # such as bos_token, as templates call them
    specials: tuple[str, ...]  # tokens that stand for no text

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give the same tokens."""

    def encode(self, text: str) -> Tokens:
        """The tokens of a text, with whatever the model expects in front of it, once, and without an end."""

    def encode_at(self, text: str, *, start: bool = False) -> tuple[Tokens, Spans]:
        """The tokens of a text that has special tokens in it as text, and the characters that each comes from.

        With `start` as `encode` gives them. `Refused` where the tokenizer does not tell.
        """

    @property
    def tells_spans(self) -> bool: ...

    def decode(self, tokens: Sequence[int], *, specials: bool = False) -> str: ...

    def id_of(self, special: str) -> int:
        """The number of one of `specials`."""

    def save(self, directory: Path) -> None:
        """Write the files from which transformers loads the same tokens."""


class ByteTokenizer:
    """The UTF-8 bytes of a text. NUL, which text does not contain, ends a document."""

    eos = 0
    unit = "byte"
    chat_template: str | None = None
    tool_template: str | None = None
    named_specials: Mapping[str, str] = {}
    specials: tuple[str, ...] = ()
    fingerprint = "bytes"
    tells_spans = True

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)

    def encode_at(self, text: str, *, start: bool = False) -> tuple[Tokens, Spans]:
        widths = [len(character.encode("utf-8", "replace")) for character in text]
        starts = np.repeat(np.arange(len(text)), widths)
        return self.encode(text), np.stack([starts, starts + 1], axis=1)

    def decode(self, tokens: Sequence[int], *, specials: bool = False) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

    def id_of(self, special: str) -> int:
        raise KeyError(special)  # there are none

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
        self.chat_template = self._template(None)
        self.tool_template = self._template([{}])
        self.tells_spans: bool = tokenizer.is_fast
        self._trims = self.tells_spans and _trims(json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"])

    def _template(self, tools: Any) -> str | None:
        """The chat template: of several, the one that transformers chooses by name."""
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError:  # none, or several of which none is the default
            return None

    @property
    def fingerprint(self) -> str:
        fast = self._tokenizer.is_fast
        held = self._tokenizer.backend_tokenizer.to_str() if fast else sorted(self._tokenizer.get_vocab().items())
        told = [type(self._tokenizer).__name__, held, self.eos, self.specials, dict(self.named_specials)]
        return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True, default=str).encode())

    def encode(self, text: str) -> Tokens:
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)[self._once(ids)]

    def encode_at(self, text: str, *, start: bool = False) -> tuple[Tokens, Spans]:
        if not self.tells_spans:
            raise Refused(
                f"{type(self._tokenizer).__name__} does not tell which characters a token comes from, which data=chat "
                "needs. Save the model with a fast tokenizer (a tokenizer.json)."
            )
        made = self._tokenizer(text, add_special_tokens=start, return_offsets_mapping=True, verbose=False)
        ids, spans = made["input_ids"], np.asarray(made["offset_mapping"]).reshape(-1, 2)
        if self._trims:
            _put_blanks_back(spans, text, self._tokenizer.convert_ids_to_tokens(ids))
        kept = self._once(ids) if start else slice(None)
        return np.asarray(ids, dtype=np.int32)[kept], spans[kept]

    def _once(self, ids: Sequence[int]) -> slice:
        """The part to keep: no second start token where the text has its own, and no end, which documents get."""
        first, last = 0, len(ids)
        while last and ids[last - 1] == self.eos:
            last -= 1
        while first + 1 < last and ids[first] == ids[first + 1] == self._tokenizer.bos_token_id:
            first += 1
        return slice(first, last)

    def decode(self, tokens: Sequence[int], *, specials: bool = False) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=not specials))

    def id_of(self, special: str) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(special))

    def save(self, directory: Path) -> None:
        self._tokenizer.save_pretrained(directory)


def _trims(post_processor: Any) -> bool:
    """Whether offsets leave out the blanks at the edges of tokens, as byte-level ones do where they are told to."""
    if not isinstance(post_processor, dict):
        return False
    return bool(post_processor.get("trim_offsets")) or any(map(_trims, post_processor.get("processors", ())))


def _put_blanks_back(spans: Spans, text: str, tokens: Sequence[str]) -> None:
    """Have the span of each token end where the token does, with its blanks."""
    for number, token in enumerate(tokens):
        if blanks := len(token) - len(token.rstrip("Ġ")):
            end = int(spans[number, 1])
            if blanks == len(token):
                spans[number, 1] = end or min(blanks, len(text))
            elif text[end : end + blanks] == " " * blanks:
                spans[number, 1] = end + blanks
