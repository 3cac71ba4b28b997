"""Conversations under the templates of several families: which tokens are learned, against masks made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data.families import AGAIN, ANSWER, ASK, SYSTEM, hugging_face
from trainer.data.conversations import Conversations, recognise
from trainer.data.dataset import Sample
from trainer.data.sources import load_corpus
from trainer.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from trainer.errors import Refused
from trainer.options.data import Chat


def read(family: str, messages: list[dict[str, Any]], seq_len: int = 1000, merges: bool = False, **more: Any) -> Any:
    reader = Conversations("", HuggingFaceTokenizer(hugging_face(family, merges)), seq_len)
    return reader.samples("line 1", {"messages": messages, **more}), reader


def by_hand(family: str, *parts: str, merges: bool = False) -> tuple[list[int], list[bool]]:
    """Tokens of texts, of which every second is learned."""
    tokenizer = hugging_face(family, merges)
    tokens: list[int] = []
    targets: list[bool] = []
    for number, part in enumerate(parts):
        made = tokenizer(part, add_special_tokens=False)["input_ids"]
        tokens += made
        targets += [number % 2 == 1] * len(made)
    return tokens, targets


def as_lists(sample: Sample) -> tuple[list[int], list[bool]]:
    return sample.tokens.tolist(), sample.targets.tolist()


CASES: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "qwen": (
        "qwen",
        [SYSTEM, *AGAIN],
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
            "4.<|im_end|>",
            "\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n",
            "é6<|im_end|>",
            "\n",
        ],
    ),
    "llama 3": (
        "llama3",
        [SYSTEM, *AGAIN],
        [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "4.<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n3+3?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "é6<|eot_id|>",
        ],
    ),
    "mistral": (
        "mistral",
        AGAIN,
        ["<s>[INST] 2+2? [/INST]", " 4.</s>", "[INST] 3+3? [/INST]", " é6</s>"],
    ),
    "gemma": (
        "gemma",
        AGAIN,
        [
            "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
            "4.<end_of_turn>",
            "\n<start_of_turn>user\n3+3?<end_of_turn>\n<start_of_turn>model\n",
            "é6<end_of_turn>",
            "\n",
        ],
    ),
    "zephyr": (
        "zephyr",
        [SYSTEM, *AGAIN],
        [
            "<|system|>\nBe brief.</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n",
            "4.</s>",
            "\n<|user|>\n3+3?</s>\n<|assistant|>\n",
            "é6</s>",
            "\n",
        ],
    ),
    "the template marks the turns": ("marked", AGAIN, ["Q: 2+2? A: ", "4.<end>", "Q: 3+3? A: ", "é6<end>"]),
    "no token ends a turn": (
        "plain",
        AGAIN,
        ["user: 2+2?\n\nassistant: ", "4.\n\n", "user: 3+3?\n\nassistant: ", "é6\n\n"],
    ),
    "the last turn is the user's": (
        "zephyr",
        [*AGAIN[:2], ASK],
        ["<|user|>\n2+2?</s>\n<|assistant|>\n", "4.</s>", "\n<|user|>\n2+2?</s>\n"],
    ),
    "an empty turn keeps its place": (
        "zephyr",
        [ASK, {"role": "assistant", "content": ""}, *AGAIN[:2]],
        [
            "<|user|>\n2+2?</s>\n<|assistant|>\n</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n",
            "4.</s>",
            "\n",
        ],
    ),
    "an empty turn that is marked": (
        "marked",
        [ASK, {"role": "assistant", "content": ""}, *AGAIN[:2]],
        ["Q: 2+2? A: <end>Q: 2+2? A: ", "4.<end>"],
    ),
    "the same words twice": (
        "zephyr",
        [{"role": "user", "content": "4."}, ANSWER],
        ["<|user|>\n4.</s>\n<|assistant|>\n", "4.</s>", "\n"],
    ),
}


@pytest.mark.parametrize("merges", [False, True], ids=["bytes", "words"])
@pytest.mark.parametrize("case", CASES)
def test_the_assistants_turns_are_learned_with_their_end(case: str, merges: bool) -> None:
    family, messages, parts = CASES[case]
    if family in ("marked", "plain"):
        merges = False  # their words reach over the seams
    (sample,), _ = read(family, messages, merges=merges)
    assert as_lists(sample) == by_hand(family, *parts, merges=merges)
    # The control: the seam one character further on is seen.
    assert as_lists(sample) != by_hand(family, parts[0] + parts[1][:1], parts[1][1:], *parts[2:], merges=merges)


def test_a_word_over_the_seam_is_learned() -> None:
    (sample,), _ = read("marked", AGAIN[:2], merges=True)
    words = [hugging_face("marked", True).decode([token]) for token in sample.tokens]
    assert " 4" in words and sample.targets[words.index(" 4")] and not sample.targets[words.index(" 4") - 1]


def test_calls_of_tools_are_learned_and_their_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "content": "4", "tool_call_id": "1"}, ANSWER]
    (sample,), reader = read("qwen", messages)
    called = '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    assert as_lists(sample) == by_hand(
        "qwen",
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
        called,
        "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "4.<|im_end|>",
        "\n",
    )
    assert reader.tally["empty"] == 0


def test_where_later_turns_change_earlier_ones_every_turn_is_a_sample() -> None:
    said = [
        {**one, "content": f"<think>so</think>{one['content']}"} if one["role"] == "assistant" else one for one in AGAIN
    ]
    samples, reader = read("thinking", said)
    start, then = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
    between = "\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
    assert [as_lists(one) for one in samples] == [
        by_hand("thinking", start, "<think>so</think>4." + then, "\n"),
        by_hand("thinking", start + "4." + then + between, "<think>so</think>é6" + then, "\n"),
    ]
    assert "1 conversations give one sample for each turn" in " ".join(reader.notes())


def test_what_is_too_long_is_cut_at_the_end_and_what_holds_nothing_is_left_out() -> None:
    (sample,), reader = read("zephyr", AGAIN, seq_len=40)
    whole, _ = read("zephyr", AGAIN)
    assert len(sample.tokens) == 41 and sample.tokens.tolist() == whole[0].tokens[:41].tolist()
    assert reader.notes()[1] == "1 samples are longer than train.seq_len=40 and are cut at the end"
    none, reader = read("zephyr", AGAIN, seq_len=5)
    assert none == [] and "say nothing within train.seq_len=5 that is learned, and are left out" in reader.notes()[-1]
    none, reader = read("zephyr", [ASK, {"role": "assistant", "content": " "}])
    assert none == [] and "1 turns of the assistant are empty" in " ".join(reader.notes())
    assert reader.notes()[-1] == "1 conversations hold no turn that is learned, and are left out"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"messages": AGAIN[:2]}, "messages"),
        ({"messages": [{**ASK, "content": [{"type": "text", "text": "2+2?"}]}, ANSWER]}, "messages"),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4."}]},
            "conversations (ShareGPT)",
        ),
        ({"instruction": "2+2?", "input": "", "output": "4."}, "instruction, input and output (Alpaca)"),
    ],
)
def test_kinds_of_records_are_recognised(record: dict[str, Any], kind: str) -> None:
    told, messages = recognise("line 1", record)
    assert told == kind and [{k: m[k] for k in ("role", "content")} for m in messages] == AGAIN[:2]


def test_an_input_follows_its_instruction_and_a_system_text_comes_first() -> None:
    _, messages = recognise("", {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be brief."})
    assert [message["content"] for message in messages] == ["Be brief.", "Add\n\n2 2", "4"]


QUIET = {"role": "assistant", "content": "BAD"}


@pytest.mark.parametrize("family", ["zephyr", "marked", "thinking"])
@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": 0}])
def test_a_turn_that_is_not_to_be_learned_is_read_and_not_learned(family: str, flag: dict[str, Any]) -> None:
    turns = [ASK, {**QUIET, **flag}, *AGAIN[:2]]
    (sample,), reader = read(family, turns)
    tokenizer = hugging_face(family)
    assert "BAD" in tokenizer.decode(sample.tokens) and "BAD" not in tokenizer.decode(sample.tokens[sample.targets])
    assert "4." in tokenizer.decode(sample.tokens[sample.targets])
    assert "1 turns of the assistant are not learned, as their records say" in reader.notes()
    (sample,), _ = read(family, [ASK, {**QUIET, **dict.fromkeys(flag, 1)}, *AGAIN[:2]])  # the control
    assert "BAD" in tokenizer.decode(sample.tokens[sample.targets])


@pytest.mark.parametrize(
    "more", [{"mask": False}, {"prefix": 0}, {"ignore": "false"}, {"mask": [1, 0]}, {"skip": "no"}]
)
def test_a_flag_that_says_nothing_or_is_none_is_no_reason_to_refuse(more: dict[str, Any]) -> None:
    recognise("line 7", {"messages": [ASK, {**ANSWER, **more}]})
    part = {"type": "text", "text": "a", "weight": 1, **more}
    recognise("line 7", {"messages": [ASK, {**ANSWER, "content": [part]}]})


def test_what_nobody_is_to_learn_is_left_out_and_counted() -> None:
    none, reader = read("zephyr", [ASK, {**ANSWER, "weight": 0}])
    assert none == [] and reader.notes()[1:] == [
        "1 turns of the assistant are not learned, as their records say",
        "1 conversations hold no turn that is learned, and are left out",
    ]


def test_shared_turns_have_flags_too() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "BAD", "weight": 0}]
    turns += [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}]
    reader = Conversations("", HuggingFaceTokenizer(hugging_face("zephyr")), 500)
    (sample,) = reader.samples("", {"conversations": turns})
    assert hugging_face("zephyr").decode(sample.tokens[sample.targets]) == "good</s>"


def test_of_a_prompt_in_messages_nothing_is_learned() -> None:
    reader = Conversations("", HuggingFaceTokenizer(hugging_face("zephyr")), 500)
    (sample,) = reader.samples("", {"prompt": [*AGAIN[:2], ASK], "completion": [{**ANSWER, "content": "six"}]})
    assert hugging_face("zephyr").decode(sample.tokens[sample.targets]) == "six</s>"
    assert "4." in hugging_face("zephyr").decode(sample.tokens)
    assert reader.notes()[0].startswith("1 records of prompt and completion in messages")


def test_a_system_text_beside_messages_comes_first() -> None:
    for record in (
        {"messages": AGAIN[:2]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [ASK], "completion": [ANSWER]},
    ):
        assert recognise("", {**record, "system": "Be brief."})[1][0] == SYSTEM
        with pytest.raises(Refused, match="line 1 has a history beside its messages"):
            recognise("line 1", {**record, "history": [["a", "b"]]})
    with pytest.raises(Refused, match="has a system text beside one in its messages"):
        recognise("line 1", {"messages": [SYSTEM, *AGAIN], "system": "x"})


def test_turns_of_conversations_keep_what_else_they_say() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"from": "tool", "value": "4"}, {"from": "gpt", "value": "4."}]
    reader = Conversations("", HuggingFaceTokenizer(hugging_face("qwen")), 500)
    (sample,) = reader.samples("", {"conversations": turns})
    assert '"name": "add", "arguments": {"a": 2}' in hugging_face("qwen").decode(sample.tokens[sample.targets])


def test_a_call_without_its_wrapper_is_one() -> None:
    bare = {"name": "add", "arguments": '{"a": 2}'}
    (sample,), _ = read("qwen", [ASK, {"role": "assistant", "content": "", "tool_calls": [bare]}])
    assert '"arguments": {"a": 2}' in hugging_face("qwen").decode(sample.tokens)


def test_what_came_before_an_instruction_is_read() -> None:
    record = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}
    assert [m["content"] for m in recognise("", record)[1]] == ["s", "a", "b", "c", "d"]
    assert [m["content"] for m in recognise("", {**record, "history": None, "system": None})[1]] == ["c", "d"]


def test_functions_are_tools_as_they_were_called_before() -> None:
    call = {"name": "add", "arguments": '{"a": 2}'}
    messages = [
        ASK,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "content": "4"},
    ]
    (sample,), _ = read("qwen", [*messages, ANSWER])
    text = hugging_face("qwen").decode(sample.tokens)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2}}' in text and "<tool_response>\n4\n" in text


def test_the_token_that_ends_turns_is_known() -> None:
    for family, ending in (
        ("qwen", {"<|im_end|>"}),
        ("marked", {"<end>"}),
        ("plain", set()),
        ("gemma", {"<end_of_turn>"}),
    ):
        _, reader = read(family, AGAIN)
        assert reader.endings == ending
        assert ("never stops by itself" in " ".join(reader.notes())) == (not ending)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "other fields": ({"text": "x"}, "data=jsonl for texts"),
    "no list": ({"messages": "hello"}, "messages is no list of messages"),
    "nobody speaks": ({"messages": [{"content": "x"}]}, "a message has no role"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "the content of a message is a number"),
    "a weight": ({"messages": [ASK, {**ANSWER, "weight": 0.3}]}, "weight is 0.3, and something is learned"),
    "a part of it": (
        {"messages": [ASK, {**ANSWER, "train_detail": [{"begin": 1}]}]},
        "says in train_detail which part",
    ),
    "a mask": ({"messages": [ASK, {**ANSWER, "mask": 1}]}, "a message says mask: 1, which is not read here"),
    "a prefix": ({"messages": [ASK, {**ANSWER, "prefix": True}]}, "a message says prefix: True, which is not read"),
    "ignored": ({"conversations": [{"from": "gpt", "value": "a", "ignore": "true"}]}, "says ignore: 'true', which is"),
    "a part": (
        {"messages": [ASK, {**ANSWER, "content": [{"type": "text", "text": "a", "weight": 0}]}]},
        "a part of a message is not to be learned. Make it a message of its own",
    ),
    "the user": ({"messages": [{**ASK, "train": True}, ANSWER]}, "a message of the role user says that it is learned"),
    "calls": ({"messages": [ASK, {**ANSWER, "tool_calls": "add"}]}, "the tool_calls of a message are no list"),
    "no history": ({"instruction": "", "output": "", "history": "a"}, "history is no list of pairs"),
    "a prompt alone": ({"prompt": [ASK], "completion": "a"}, "completion is no list of messages"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are no text"),
    "a stranger": ({"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator', which is none of"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_records_that_are_no_conversation_are_refused_by_their_line(case: str) -> None:
    record, message = REFUSALS[case]
    with pytest.raises(Refused, match=f"line 7.*{message}"):
        recognise("line 7", record)


@pytest.mark.parametrize(
    ("family", "messages", "message"),
    [
        ("gemma", [SYSTEM, *AGAIN], r"cannot write this conversation: System role not supported"),
        ("mistral", [ANSWER], r"cannot write this conversation: Roles must alternate"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_named(family: str, messages: list[Any], message: str) -> None:
    with pytest.raises(Refused, match=f"line 1: the chat template {message}.*data.template=FILE"):
        read(family, messages)


def test_a_file_of_conversations_is_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": [ASK, {**ANSWER, "content": str(n)}]}) + "\n" for n in range(50)))
    config = Chat(path=str(path), eval_fraction=0.2, template="chatml")
    corpus = load_corpus(config, ByteTokenizer(), 200)
    assert len(corpus.train) + len(corpus.held_out) == 50 and len(corpus.held_out) > 2
    assert corpus.notes[0] == "50 records of messages, loss on the assistant's turns"
    assert corpus.notes[1].startswith("no token of this tokenizer ends 50 turns") and corpus.endings == set()
    tokens, targets = corpus.train.sample(0)
    said = bytes(tokens[targets].tolist()).decode()
    assert said.removesuffix("\n").removesuffix("<|im_end|>").isdigit()
    assert np.flatnonzero(targets)[0] > 10


def test_null_is_no_kind_of_record() -> None:
    """As in tables that have a column for each kind."""
    kind, messages = recognise("line 1", {"messages": None, "conversations": None, "instruction": "i", "output": "o"})
    assert "Alpaca" in kind and [one["content"] for one in messages] == ["i", "o"]


def test_fields_and_roles_that_are_not_read_are_named() -> None:
    turns = [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]
    samples, reader = read("qwen", turns, context="c")
    assert samples == []
    roles, unread = reader.notes()[-2:]
    assert roles.startswith("roles of those: gpt, human. What is learned has the role assistant")
    assert unread == "fields of records that are not read: context"
