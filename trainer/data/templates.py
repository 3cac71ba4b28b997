"""Chat templates: the text that one makes of a conversation, and the assistant's parts of it.

The template tells where it marks it (`{% generation %}`); elsewhere it follows from what it makes of the conversation
up to each turn: the turn is what comes after the prompt that the model is given to answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from checkpointing.errors import first_few
from trainer.data.tokenizer import Tokenizer
from trainer.errors import Refused
from trainer.options.data import Data

Message = dict[str, Any]
Span = tuple[int, int]  # of characters

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEARNED = "learned"  # of a message that says whether it is; no template sees it
REASONING = ("reasoning_content", "reasoning", "thinking")  # what a message calls what was thought before it was said
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


def is_empty(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


# Some templates put the day into their text, and samples must not be others tomorrow: it is 26 July 2024 for them.
_CODES = ("d", "b", "B", "m", "Y", "y", "A", "a", "H", "M", "S")
_FIXED = "".join(f"|replace('%{code}','{datetime(2024, 7, 26):%{code}}')" for code in _CODES)
_DAY = f"{{% macro strftime_now(format) %}}{{{{ format{_FIXED} }}}}{{% endmacro %}}"


class Template:
    """A chat template, and where in its text the assistant speaks."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self._tokenizer = source, tokenizer
        self.marks = _MARKS.search(source) is not None

    def texts(self, where: str, messages: list[Message], context: Mapping[str, Any]) -> list[tuple[str, list[Span]]]:
        """Texts that the model reads, with the learned turns in them; several where none holds all turns.

        `context` are the template's arguments beside the messages.
        """
        whole, marked = self._render(where, messages, context)
        self._check_written(where, messages, context, whole)
        if self.marks:
            return [(whole, self._kept(where, messages, whole, marked))]
        together: list[Span] = []
        turns: list[tuple[str, list[Span]]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or is_empty(message) or not message.get(LEARNED, True):
                continue
            text, span = self._turn(where, messages[: number + 1], context)
            turns.append((text, [span]))
            if whole.startswith(text[: span[1]]):
                together.append(span)
        return [(whole, together)] if len(together) == len(turns) else turns

    def _kept(self, where: str, messages: list[Message], whole: str, marked: list[Span]) -> list[Span]:
        """The spans that the template marks, that say something, and that are learned."""
        said = [message for message in messages if message["role"] == "assistant"]
        if not marked and not all(map(is_empty, said)):
            raise Refused(
                f"{where}: the chat template marks no turn of this conversation as the assistant's, although it "
                "has one. Mend the {% generation %} of the template, or give another: data.template=FILE."
            )
        learned = [message.get(LEARNED, True) for message in said]
        if not all(learned):
            if len(marked) != len(said):
                raise Refused(
                    f"{where}: a turn is not to be learned, and the chat template marks {len(marked)} parts of "
                    f"{len(said)} turns, so that it cannot be told which is which. Give a template without "
                    "{% generation %}: data.template=FILE."
                )
            marked = [span for span, kept in zip(marked, learned, strict=True) if kept]
        return [span for span in marked if self._says_something(whole[slice(*span)])]

    def _check_written(self, where: str, messages: list[Message], context: Mapping[str, Any], whole: str) -> None:
        """`Refused` where the template drops what the record holds, as some drop tools, or the system's words."""
        dropped = [
            key
            for key in ("tools", "documents")
            if key in context and self._render(where, messages, {**context, key: None})[0] == whole
        ]
        for number, message in enumerate(messages):
            parts = [("tool_calls", call["function"].get("name")) for call in _functions(message)]
            parts += [(key, message[key]) for key in REASONING if key in message]
            lacking = [what for what, text in parts if _longest_word(text) not in whole]
            if lacking and not self.marks:  # which a turn that is learned by itself may have all the same
                here = self._render(where, messages[: number + 1], context)[0]
                lacking = [what for what, text in parts if _longest_word(text) not in here]
            if message["role"] != "assistant" and _longest_word(message["content"]) not in whole:
                lacking.append(f"message of the role {message['role']}")
            dropped += lacking
        if dropped:
            raise Refused(
                f"{where}: the chat template does not write the {first_few(sorted(set(dropped)))} of this record, so "
                "that the model would not see it. Remove it, or give a template that does: data.template=FILE."
            )

    def _turn(self, where: str, messages: list[Message], context: Mapping[str, Any]) -> tuple[str, Span]:
        """The text up to the last message, which is the assistant's, and the part of it that is to be learned."""
        text, _ = self._render(where, messages, context)
        before, _ = self._render(where, messages[:-1], context, prompt=True)
        said = messages[-1]["content"].strip()
        if text.startswith(before):
            start = len(before)
        else:  # the prompt to answer holds more than its answer starts with, or the template knows of no such prompt
            shorter, _ = self._render(where, messages[:-1], context)
            start = text.find(said, len(shorter)) if text.startswith(shorter) and said else -1
        if start < 0 or said not in text[start:]:
            raise Refused(
                f"{where}: the chat template does not write what the assistant says behind what comes before it, so "
                "that it cannot be told what is to be learned. Mark it in the template with {% generation %}, or give "
                "another template: data.template=FILE."
            )
        end = len(text.rstrip())
        # White space after the token that ends a turn is the template's, not the model's.
        return text, (start, end if text[:end].endswith(self._tokenizer.specials) else len(text))

    def _says_something(self, text: str) -> bool:
        for special in self._tokenizer.specials:
            text = text.replace(special, "")
        return bool(text.strip())

    def _render(
        self, where: str, messages: list[Message], context: Mapping[str, Any], prompt: bool = False
    ) -> tuple[str, list[Span]]:
        shown = [{key: value for key, value in message.items() if key != LEARNED} for message in messages]
        try:
            made: Any = render_jinja_template(
                [shown],
                chat_template=(_DAY if "strftime_now" in self.source else "") + self.source,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=prompt,
                **{**context, **self._tokenizer.named_specials},
            )
        except (
            *(jinja2.TemplateError, TypeError, ValueError, AttributeError),
            *(LookupError, ArithmeticError, RecursionError),
        ) as error:
            raise Refused(
                f"{where}: the chat template cannot write this conversation: {error}. Mend the line, or give another "
                "template: data.template=FILE."
            ) from None
        texts, spans = made
        return texts[0], [tuple(span) for span in spans[0]] if spans else []


def _functions(message: Message) -> list[Mapping[str, Any]]:
    """The calls of a message that name a function."""
    calls = message.get("tool_calls") or []
    return [call for call in calls if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)]


def _longest_word(text: Any) -> str:
    """The longest word of a text: it is found again however a template quotes the text."""
    return max(re.findall("[A-Za-z0-9]+", text), key=len, default="") if isinstance(text, str) else ""


def chosen_template(config: Data) -> str | None:
    """The Jinja of a template that was named; None where the tokenizer's own is read."""
    return _named(getattr(config, "template", ""))


def _named(given: str) -> str | None:
    if given == "chatml":
        return CHATML
    return Path(os.path.expanduser(given)).read_text(encoding="utf-8") if given else None


def source_of(given: str, own: str | None) -> str:
    if given and given != "chatml" and not Path(os.path.expanduser(given)).is_file():
        raise Refused(f"data.template={given} is no file and not chatml. Type data.template=FILE.")
    if (chosen := _named(given)) is not None:
        return chosen
    if own is None:
        raise Refused(
            "This model's tokenizer has no chat template, as is usual for a model that was not trained to chat. Type "
            "data.template=chatml, or data.template=FILE with a Jinja template."
        )
    return own
