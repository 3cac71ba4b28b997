"""Conversations to samples: what the assistant says is learned, and all else is what it says it after.

The text is what the model's own chat template makes of a conversation. Which of it is the assistant's the template
tells where it marks it (`{% generation %}`); elsewhere it follows from what the template makes of the conversation up
to each turn: the turn is what comes after the prompt that the model is given to answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.choices import Data
from trainer.data.dataset import Sample
from trainer.data.records import Record, string
from trainer.data.tokenizer import Tokenizer
from trainer.errors import Refused

Message = dict[str, Any]
Span = tuple[int, int]  # of characters

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the roles of ShareGPT's records are called in templates.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


class Conversations:
    """Records of `messages`, of `conversations` (ShareGPT), or of `instruction`, `input` and `output` (Alpaca)."""

    def __init__(self, template: str, tokenizer: Tokenizer, seq_len: int) -> None:
        """`template` is a file, or `chatml`; empty for the tokenizer's own. `Refused` where there is none."""
        self.template = Template(template, tokenizer)
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.tally: Counter[str] = Counter()

    @property
    def key(self) -> str:
        return str([self.template.source, self.tokenizer.fingerprint, self.seq_len])

    def notes(self) -> list[str]:
        kinds = [(key.removesuffix(" "), count) for key, count in sorted(self.tally.items()) if key.endswith(" ")]
        found = [f"{count} records of {kind}, loss on the assistant's turns" for kind, count in kinds]
        if self.tally["split"]:
            found.append(
                f"the template writes earlier turns differently later on: {self.tally['split']} conversations give one "
                "sample for each turn of the assistant"
            )
        if self.tally["truncated"]:
            found.append(
                f"{self.tally['truncated']} samples are longer than train.seq_len={self.seq_len} and are cut at the end"
            )
        if self.tally["empty"]:
            found.append(f"{self.tally['empty']} turns of the assistant are empty and are not learned")
        if self.tally["silent"]:
            found.append(f"{self.tally['silent']} samples hold nothing that the assistant says, and are left out")
        return found

    def samples(self, where: str, record: Record) -> list[Sample]:
        kind, messages = recognise(where, record)
        self.tally[f"{kind} "] += 1  # not the name of another count
        tools = record.get("tools") or None
        if isinstance(tools, str):
            tools = _parsed(tools)
        texts = self.template.texts(where, messages, tools)
        self.tally["empty"] += sum(message["role"] == "assistant" and is_empty(message) for message in messages)
        self.tally["split"] += len(texts) > 1
        return [sample for text, spans in texts if (sample := self._sample(text, spans)) is not None]

    def _sample(self, text: str, spans: Sequence[Span]) -> Sample | None:
        tokens, origins = self.tokenizer.encode_at(text)
        starts, ends = origins[:, 0], origins[:, 1]
        targets = np.zeros(len(tokens), np.bool_)
        for start, end in spans:
            targets |= (starts < end) & (ends > start)
        targets[:1] = False
        cut = Sample(tokens[: self.seq_len + 1], targets[: self.seq_len + 1])
        if not cut.targets.any():
            self.tally["silent"] += 1
            return None
        self.tally["truncated"] += len(tokens) > self.seq_len + 1
        return cut


def recognise(where: str, record: Record) -> tuple[str, list[Message]]:
    """What kind of record it is, in words, and its messages as templates take them."""
    if "messages" in record:
        return "messages", [_message(where, one) for one in _turns(where, record, "messages")]
    if "conversations" in record:
        turns = [_shared(where, one) for one in _turns(where, record, "conversations")]
        if record.get("system"):
            turns.insert(0, {"role": "system", "content": string(record, "system", where)})
        return "conversations (ShareGPT)", turns
    if {"instruction", "output"} <= set(record):
        asked = string(record, "instruction", where)
        if record.get("input"):
            asked += "\n\n" + string(record, "input", where)
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": string(record, "output", where)}]
        if record.get("system"):
            turns.insert(0, {"role": "system", "content": string(record, "system", where)})
        return "instruction, input and output (Alpaca)", turns
    raise Refused(
        f"{where} has the fields {sorted(record)}, and data=chat reads messages, conversations, or instruction and "
        "output. Rename them, or type data=jsonl for texts and for prompts with completions."
    )


def _turns(where: str, record: Record, key: str) -> list[Mapping[str, Any]]:
    turns = record[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise Refused(f"{where}: {key} is no list of messages, each an object. Mend or remove the line.")
    return turns


def _message(where: str, given: Mapping[str, Any]) -> Message:
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str):
        raise Refused(f"{where}: a message has no role, only {sorted(given)}. Mend or remove the line.")
    if isinstance(content, list):  # in parts, as for models that see
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise Refused(f"{where}: a message holds parts that are no text. Mend or remove the line.")
        content = "".join(part["text"] for part in content)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise Refused(f"{where}: the content of a message is a {type(content).__name__}, not a text. Mend it.")
    kept = {key: value for key, value in given.items() if value is not None}
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_called(call) for call in calls]
    return {**kept, "role": "system" if role == "developer" else role, "content": content}


def _called(call: Any) -> Any:
    """With arguments as an object: hosted models give a text of JSON, which templates would quote again."""
    if isinstance(call, Mapping) and isinstance(function := call.get("function"), Mapping):
        arguments = function.get("arguments")
        return {**call, "function": {**function, "arguments": _parsed(arguments)}}
    return call


def _parsed(given: Any) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _shared(where: str, given: Mapping[str, Any]) -> Message:
    role, content = given.get("from", given.get("role")), given.get("value", given.get("content"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Refused(f"{where}: a message is from {role!r}, which is none of {', '.join(ROLES)}. Mend the line.")
    return _message(where, {"role": ROLES[role.lower()], "content": content})


def is_empty(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


# Some templates put the day into their text, and samples must not be others tomorrow: it is 26 July 2024 for them.
_CODES = ("d", "b", "B", "m", "Y", "y", "A", "a", "H", "M", "S")
_FIXED = "".join(f"|replace('%{code}','{datetime(2024, 7, 26):%{code}}')" for code in _CODES)
_DAY = f"{{% macro strftime_now(format) %}}{{{{ format{_FIXED} }}}}{{% endmacro %}}"


class Template:
    """A chat template, and where in its text the assistant speaks."""

    def __init__(self, given: str, tokenizer: Tokenizer) -> None:
        self.source, self._tokenizer = _source(given, tokenizer), tokenizer
        self.marks = _MARKS.search(self.source) is not None

    def texts(self, where: str, messages: list[Message], tools: Any) -> list[tuple[str, list[Span]]]:
        """What the model reads, with the assistant's turns in it; several where no one text holds all turns as they
        are said."""
        whole, marked = self._render(where, messages, tools)
        if self.marks:
            if not marked and any(m["role"] == "assistant" and not is_empty(m) for m in messages):
                raise Refused(
                    f"{where}: the chat template marks no turn of this conversation as the assistant's, although it "
                    "has one. Mend the {% generation %} of the template, or give another: data.template=FILE."
                )
            return [(whole, [span for span in marked if self._says_something(whole[slice(*span)])])]
        together: list[Span] = []
        turns: list[tuple[str, list[Span]]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or is_empty(message):
                continue
            text, span = self._turn(where, messages[: number + 1], tools)
            turns.append((text, [span]))
            if whole.startswith(text[: span[1]]):
                together.append(span)
        return [(whole, together)] if len(together) == len(turns) else turns

    def _turn(self, where: str, messages: list[Message], tools: Any) -> tuple[str, Span]:
        """The text up to the last message, which is the assistant's, and the part of it that is to be learned."""
        text, _ = self._render(where, messages, tools)
        before, _ = self._render(where, messages[:-1], tools, prompt=True)
        said = messages[-1]["content"].strip()
        if text.startswith(before):
            start = len(before)
        else:  # the prompt to answer holds more than its answer starts with, or the template knows of no such prompt
            shorter, _ = self._render(where, messages[:-1], tools)
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

    def _render(self, where: str, messages: list[Message], tools: Any, prompt: bool = False) -> tuple[str, list[Span]]:
        try:
            made: Any = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=(_DAY if "strftime_now" in self.source else "") + self.source,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=prompt,
                **self._tokenizer.named_specials,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise Refused(
                f"{where}: the chat template cannot write this conversation: {error}. Mend the line, or give another "
                "template: data.template=FILE."
            ) from None
        texts, spans = made
        return texts[0], [tuple(span) for span in spans[0]] if spans else []


def chosen_template(config: Data) -> str | None:
    """The Jinja of a template that was named; None where the tokenizer's own is read."""
    return _named(getattr(config, "template", ""))


def _named(given: str) -> str | None:
    if given == "chatml":
        return CHATML
    return Path(given).expanduser().read_text(encoding="utf-8") if given else None


def _source(given: str, tokenizer: Tokenizer) -> str:
    if given and given != "chatml" and not Path(given).expanduser().is_file():
        raise Refused(f"data.template={given} is no file and not chatml. Type data.template=FILE.")
    if (chosen := _named(given)) is not None:
        return chosen
    if tokenizer.chat_template is None:
        raise Refused(
            "This model's tokenizer has no chat template, as is usual for a model that was not trained to chat. Type "
            "data.template=chatml, or data.template=FILE with a Jinja template."
        )
    return tokenizer.chat_template
