"""Conversations under the templates of several families: which tokens are learned, against masks made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer.choices import Chat
from trainer.data.conversations import Conversations, recognise
from trainer.data.dataset import Sample
from trainer.data.sources import load_corpus
from trainer.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from trainer.errors import Refused

# Written for these tests, in the documented format of each family.
QWEN = """
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
LLAMA3 = """
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}
"""
MISTRAL = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}
"""
GEMMA = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
ZEPHYR = """
{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
"""
# Thoughts of earlier turns are left out, and an answer begins with some, which the prompt to answer does not have.
THINKING = """
{%- for m in messages -%}
{%- set said = m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content -%}
{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""
MARKED = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ 'A: ' }}{% generation %}{{ m.content + '<end>' }}{% endgeneration %}
{%- else -%}{{ 'Q: ' + m.content + ' ' }}{%- endif -%}
{%- endfor -%}
"""
PLAIN = """
{%- for m in messages -%}{{ m.role + ': ' + m.content + '\n\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}
"""
SPECIALS = {
    "qwen": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>"],
    "gemma": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "zephyr": ["</s>"],
    "thinking": ["<|im_start|>", "<|im_end|>"],
    "marked": ["<end>"],
    "plain": ["<end>"],
}
TEMPLATES = dict(zip(SPECIALS, (QWEN, LLAMA3, MISTRAL, GEMMA, ZEPHYR, THINKING, MARKED, PLAIN), strict=True))

ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4."}
AGAIN = [ASK, ANSWER, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "é6"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def hugging_face(family: str, merges: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte beside the family's own; with merges, words of several bytes too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if merges:
        text = ["user assistant system model 2+2? 4. 3+3? Be brief."] * 9
        made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    special = SPECIALS[family]
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[0],
        eos_token=special[-1],
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    loaded.chat_template = TEMPLATES[family].strip()
    return loaded


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
    assert none == [] and "hold nothing that the assistant says" in reader.notes()[-1]
    none, reader = read("zephyr", [ASK, {"role": "assistant", "content": " "}])
    assert none == [] and "1 turns of the assistant are empty" in " ".join(reader.notes())


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


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "other fields": ({"text": "x"}, "data=jsonl for texts"),
    "no list": ({"messages": "hello"}, "messages is no list of messages"),
    "nobody speaks": ({"messages": [{"content": "x"}]}, "a message has no role"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "the content of a message is a int"),
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


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",  # leaves out what is said
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",  # rewrites what came before
    ],
)
def test_a_template_that_hides_what_is_to_be_learned_is_refused(template: str, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(template)
    reader = Conversations(str(tmp_path / "own.jinja"), ByteTokenizer(), 64)
    with pytest.raises(Refused, match="does not write what the assistant says behind what comes before it"):
        reader.samples("line 1", {"messages": AGAIN})


def test_a_template_that_is_no_jinja_and_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}")
    with pytest.raises(Refused, match="cannot write this conversation: Unexpected end of template"):
        Conversations(str(tmp_path / "own.jinja"), ByteTokenizer(), 64).samples("line 1", {"messages": AGAIN})
    with pytest.raises(Refused, match=r"data.template=absent is no file and not chatml"):
        Conversations("absent", ByteTokenizer(), 64)
    with pytest.raises(Refused, match=r"has no chat template.*data.template=chatml"):
        Conversations("", ByteTokenizer(), 64)


def test_a_file_of_conversations_is_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": [ASK, {**ANSWER, "content": str(n)}]}) + "\n" for n in range(50)))
    config = Chat(path=str(path), eval_fraction=0.2, template="chatml")
    corpus = load_corpus(config, ByteTokenizer(), 200)
    assert len(corpus.train) + len(corpus.held_out) == 50 and len(corpus.held_out) > 2
    assert corpus.notes == ["50 records of messages, loss on the assistant's turns"]
    tokens, targets = corpus.train.sample(0)
    said = bytes(tokens[targets].tolist()).decode()
    assert said.removesuffix("\n").removesuffix("<|im_end|>").isdigit()
    assert np.flatnonzero(targets)[0] > 10


def test_a_template_that_writes_the_day_gives_the_same_samples_tomorrow(tmp_path: Path) -> None:
    """As those of Llama 3 do."""
    template = tmp_path / "template.jinja"
    day = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"
    template.write_text(day + "{% for m in messages %}{{ m['role'] }} {{ m['content'] }};{% endfor %}")
    reader = Conversations(str(template), ByteTokenizer(), 200)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (sample,) = reader.samples("here", {"messages": turns})
    assert ByteTokenizer().decode(sample.tokens.tolist()) == "26 Jul 2024 2024-07-26user a;assistant b;"
