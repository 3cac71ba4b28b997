"""Conversations to samples: what the assistant says is learned, and all else is what it says it after.

The kinds of records are told apart here, and templates.py writes them as the model reads them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from checkpointing.errors import first_few
from trainer.data.dataset import Sample
from trainer.data.records import (
    FLAGS,
    UNREAD,
    Record,
    check_flags,
    check_learning,
    is_learned,
    kind_of,
    mended,
    mendings,
    string,
    unread,
)
from trainer.data.templates import LEARNED, Message, Span, Template, is_empty, source_of
from trainer.data.tokenizer import Tokenizer
from trainer.errors import Refused

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
ROLES_OF_TEMPLATES = {"developer": "system", "function": "tool"}


class Conversations:
    """Records of `messages`, of `conversations` (ShareGPT), of `instruction`, `input` and `output` (Alpaca), or of a
    `prompt` and a `completion` that are lists of messages."""

    def __init__(self, template: str, tokenizer: Tokenizer, seq_len: int) -> None:
        """`template` is a file, or `chatml`; empty for the tokenizer's own. `Refused` where there is none."""
        self.template = Template(source_of(template, tokenizer.chat_template), tokenizer)
        self.tool_template = Template(source_of(template, tokenizer.tool_template), tokenizer)
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.tally: Counter[str] = Counter()

    @property
    def key(self) -> str:
        return str([self.template.source, self.tool_template.source, self.tokenizer.fingerprint, self.seq_len])

    def notes(self) -> list[str]:
        kinds = [(key.removesuffix(" "), count) for key, count in sorted(self.tally.items()) if key.endswith(" ")]
        found = [f"{count} records of {kind}, loss on the assistant's turns" for kind, count in kinds]
        if self.tally["split"]:
            found.append(
                f"the template writes earlier turns differently later on: {self.tally['split']} conversations give one "
                "sample for each turn of the assistant"
            )
        for key, what in (
            ("truncated", f"samples are longer than train.seq_len={self.seq_len} and are cut at the end"),
            ("cut", f"samples say nothing within train.seq_len={self.seq_len} that is learned, and are left out"),
            ("empty", "turns of the assistant are empty and are not learned"),
            ("not learned", "turns of the assistant are not learned, as their records say"),
            ("silent", "conversations hold no turn that is learned, and are left out"),
        ):
            if self.tally[key]:
                found.append(f"{self.tally[key]} {what}")
        if count := self.tally[_END]:
            found.append(
                f"no token of this tokenizer ends {count} turns of the assistant, so that what is trained never stops "
                "by itself: give a template that ends turns with one, such as its eos_token (data.template=FILE)"
            )
        if roles := sorted(key.removeprefix(_ROLE) for key in +self.tally if key.startswith(_ROLE)):
            found.append(
                f"roles of those: {first_few(roles)}. What is learned has the role assistant, or a name such as gpt in "
                "conversations (of from and value)"
            )
        return [*found, *mendings(self.tally), *unread(self.tally)]

    @property
    def endings(self) -> set[str]:
        """The tokens that end the turns that were learned."""
        return {key.removeprefix(_END) for key, count in self.tally.items() if key.startswith(_END) and count} - {""}

    def samples(self, where: str, record: Record) -> list[Sample]:
        record = mended(where, record, self.tally)
        check_learning(where, record)
        kind, messages = recognise(where, record)
        self.tally[f"{kind} "] += 1  # not the name of another count
        context = _context(where, record)
        template = self.tool_template if context.get("tools") else self.template
        texts = template.texts(where, messages, context)
        said = [message for message in messages if message["role"] == "assistant"]
        self.tally["empty"] += sum(map(is_empty, said))
        self.tally["not learned"] += sum(not is_empty(one) and not one.get(LEARNED, True) for one in said)
        self.tally["split"] += len(texts) > 1
        self.tally.update(UNREAD + key for key in record.keys() - _READ[kind])
        if not any(spans for _, spans in texts):
            self.tally["silent"] += 1
            self.tally.update({_ROLE + message["role"] for message in messages} if not said else ())
            return []
        return [sample for text, spans in texts if (sample := self._sample(text, spans)) is not None]

    def _sample(self, text: str, spans: Sequence[Span]) -> Sample | None:
        tokens, origins = self.tokenizer.encode_at(text)
        starts, ends = origins[:, 0], origins[:, 1]
        targets = np.zeros(len(tokens), np.bool_)
        for start, end in spans:
            targets |= (starts < end) & (ends > start)
        found = [self._ending(text[start:end]) for start, end in spans]
        # A template may mark a turn in parts, of which the last one ends it.
        self.tally.update(_END + ending for ending in (filter(None, found) if any(found) else found))
        targets[:1] = False
        cut = Sample(tokens[: self.seq_len + 1], targets[: self.seq_len + 1])
        if not cut.targets.any():
            self.tally["cut"] += 1
            return None
        self.tally["truncated"] += len(tokens) > self.seq_len + 1
        return cut

    def _ending(self, said: str) -> str:
        """The token that ends a turn; empty where none does."""
        return next((one for one in self.tokenizer.specials if one and said.rstrip().endswith(one)), "")


_END = "end:"  # of tallies: followed by the token that ends a turn
_ROLE = "role:"  # followed by one of a conversation that nobody answers in
_MESSAGES, _SHAREGPT = "messages", "conversations (ShareGPT)"
_ALPACA, _APART = "instruction, input and output (Alpaca)", "prompt and completion in messages"
_ALWAYS = {"system", "tools", "functions", "documents", "chat_template_kwargs", *FLAGS}
_READ = {
    _MESSAGES: {"messages", *_ALWAYS},
    _SHAREGPT: {"conversations", *_ALWAYS},
    _ALPACA: {"instruction", "input", "output", "history", *_ALWAYS},
    _APART: {"prompt", "completion", *_ALWAYS},
}


def recognise(where: str, record: Record) -> tuple[str, list[Message]]:
    """The kind of a record, in words, and its messages as templates take them."""
    there = {key for key, value in record.items() if value is not None}  # tables have a column for each kind
    alpaca = {"instruction", "output"} <= set(record) and not there & {"messages", "conversations"}
    if record.get("history") and not alpaca:
        raise Refused(f"{where} has a history beside its messages. Put its rounds before them, as messages.")
    if "messages" in there:
        turns = [_message(where, one) for one in _turns(where, record, "messages")]
        return _MESSAGES, [*_system(where, record, turns), *turns]
    if "conversations" in there:
        turns = [_shared(where, one) for one in _turns(where, record, "conversations")]
        return _SHAREGPT, [*_system(where, record, turns), *turns]
    if {"instruction", "output"} <= set(record):
        asked = string(record, "instruction", where)
        if record.get("input"):
            asked += "\n\n" + string(record, "input", where)
        answer = string(record, "output", where)
        turns = [*_history(where, record), *_exchange(asked, answer)]
        return _ALPACA, [*_system(where, record, turns), *turns]
    if "prompt" in record and "completion" in record and not isinstance(record["prompt"], str):
        before = [_message(where, one) for one in _turns(where, record, "prompt")]
        answers = [_message(where, one) for one in _turns(where, record, "completion")]
        turns = [{**one, LEARNED: False} if one["role"] == "assistant" else one for one in before] + answers
        return _APART, [*_system(where, record, turns), *turns]
    raise Refused(
        f"{where} has the fields {sorted(record)}, and data=chat reads messages, conversations, instruction and "
        "output, or a prompt and a completion that are lists of messages. Rename them, or type data=jsonl for texts "
        "and for prompts with completions."
    )


def _exchange(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _system(where: str, record: Record, turns: list[Message]) -> list[Message]:
    if not record.get("system"):
        return []
    if turns and turns[0]["role"] == "system":
        raise Refused(f"{where} has a system text beside one in its messages. Remove one of them.")
    return [{"role": "system", "content": string(record, "system", where)}]


def _history(where: str, record: Record) -> list[Message]:
    """The rounds before the instruction, each a question and its answer, which is learned as well (LLaMA-Factory)."""
    rounds = record.get("history") or []
    if not isinstance(rounds, list) or not all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one) for one in rounds
    ):
        raise Refused(f"{where}: history is no list of pairs of a question and its answer. Mend or remove it.")
    return [message for asked, answer in rounds for message in _exchange(asked, answer)]


# What whoever renders a template decides.
_RENDERERS = {
    *("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask", "tokenize"),
}


def _context(where: str, record: Record) -> dict[str, Any]:
    """A template's arguments beside the messages: tools, documents, and some of its own."""
    more = record.get("chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise Refused(f"{where}: chat_template_kwargs is {kind_of(more)}, not an object. Mend or remove it.")
    if own := sorted(more.keys() & _RENDERERS):
        raise Refused(f"{where}: chat_template_kwargs hold {first_few(own)}, which are not for templates. Remove them.")
    found = {key: value for key, value in more.items() if value is not None}
    for key in ("tools", "functions", "documents"):
        if value := _parsed(record.get(key)):
            if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
                raise Refused(f"{where}: {key} is no list of objects, as templates take them. Rename or remove it.")
            found[key] = value
    if functions := found.pop("functions", None):  # as tools were called before
        found["tools"] = [*found.get("tools", []), *({"type": "function", "function": one} for one in functions)]
    return found


def _turns(where: str, record: Record, key: str) -> list[Mapping[str, Any]]:
    turns = record[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise Refused(f"{where}: {key} is no list of messages, each an object. Mend or remove the line.")
    return turns


def _message(where: str, given: Mapping[str, Any]) -> Message:
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str):
        fields = sorted(key for key, one in given.items() if one is not None)
        raise Refused(f"{where}: a message has no role, only {fields}. Mend or remove the line.")
    if isinstance(content, list):  # in parts, as for models that see
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise Refused(f"{where}: a message holds parts that are no text. Mend or remove the line.")
        for part in content:  # which are learned together
            check_flags(where, part, "a part of a message")
            if is_learned(where, part) is False:
                raise Refused(f"{where}: a part of a message is not to be learned. Make it a message of its own.")
        content = "".join(part["text"] for part in content)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise Refused(f"{where}: the content of a message is {kind_of(content)}, not a text. Mend it.")
    check_flags(where, given, "a message")
    kept = {key: value for key, value in given.items() if value is not None and key not in FLAGS}
    if (call := kept.pop("function_call", None)) and "tool_calls" not in kept:  # as it was called before
        kept["tool_calls"] = [{"type": "function", "function": call}]
    if calls := kept.get("tool_calls"):
        if not isinstance(calls, list):
            raise Refused(f"{where}: the tool_calls of a message are no list. Mend or remove them.")
        kept["tool_calls"] = [_called(call) for call in calls]
    check_learning(where, {key: value for key, value in given.items() if key not in FLAGS})
    if (learned := is_learned(where, given)) is not None:
        if learned and role != "assistant":
            raise Refused(
                f"{where}: a message of the role {role} says that it is learned, and only the assistant's are. Remove "
                f"that ({', '.join(FLAGS)})."
            )
        kept[LEARNED] = learned
    return {**kept, "role": ROLES_OF_TEMPLATES.get(role, role), "content": content}


def _called(call: Any) -> Any:
    """A call with its arguments as an object: hosted models give a text of JSON, which templates would quote again."""
    if isinstance(call, Mapping) and "function" not in call and isinstance(call.get("name"), str):
        call = {"type": "function", "function": call}
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
    more = {key: one for key, one in given.items() if key not in ("from", "value")}
    return _message(where, {**more, "role": ROLES[role.lower()], "content": content})
