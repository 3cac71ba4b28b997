"""Templates: what hides, drops or cannot write a conversation is refused; the rest is in test_conversations.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.families import AGAIN, ANSWER, ASK, MARKED, QWEN, SYSTEM, hugging_face
from trainer.data.conversations import Conversations
from trainer.data.templates import CHATML
from trainer.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from trainer.errors import Refused


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
    with pytest.raises(Refused, match=r"does not write (what the assistant says|the message)"):
        reader.samples("line 1", {"messages": AGAIN})


def test_a_template_that_is_no_jinja_and_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}")
    with pytest.raises(Refused, match="cannot write this conversation: Unexpected end of template"):
        Conversations(str(tmp_path / "own.jinja"), ByteTokenizer(), 64).samples("line 1", {"messages": AGAIN})
    with pytest.raises(Refused, match=r"data.template=absent is no file and not chatml"):
        Conversations("absent", ByteTokenizer(), 64)
    with pytest.raises(Refused, match=r"has no chat template.*data.template=chatml"):
        Conversations("", ByteTokenizer(), 64)


def test_a_template_that_writes_the_day_gives_the_same_samples_tomorrow(tmp_path: Path) -> None:
    """As those of Llama 3 do."""
    template = tmp_path / "template.jinja"
    day = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"
    template.write_text(day + "{% for m in messages %}{{ m['role'] }} {{ m['content'] }};{% endfor %}")
    reader = Conversations(str(template), ByteTokenizer(), 200)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (sample,) = reader.samples("here", {"messages": turns})
    assert ByteTokenizer().decode(sample.tokens.tolist()) == "26 Jul 2024 2024-07-26user a;assistant b;"


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TOOL_USE = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}" + CHATML


def reader_of(template: Any) -> Conversations:
    tokenizer = hugging_face("qwen")
    tokenizer.chat_template = template
    return Conversations("", HuggingFaceTokenizer(tokenizer), 1000)


def text_of(reader: Conversations, record: dict[str, Any]) -> str:
    (sample,) = reader.samples("line 1", record)
    return reader.tokenizer.decode(sample.tokens.tolist(), specials=True)


def test_a_template_of_its_own_for_tools_is_used_where_there_are_some() -> None:
    reader = reader_of({"default": CHATML, "tool_use": TOOL_USE})
    assert "weather" in text_of(reader, {"messages": AGAIN, "tools": TOOLS})
    assert "TOOLS" not in text_of(reader, {"messages": AGAIN, "tools": None})
    assert text_of(reader, {"messages": AGAIN, "functions": [TOOLS[0]["function"]]}).startswith("TOOLS")
    assert reader.key != reader_of(CHATML).key


def test_what_a_record_gives_the_template_is_used() -> None:
    reader = reader_of("{% if quiet %}HUSH {% endif %}" + CHATML)
    assert text_of(reader, {"messages": AGAIN, "chat_template_kwargs": {"quiet": True}}).startswith("HUSH")
    assert not text_of(reader, {"messages": AGAIN, "chat_template_kwargs": {"quiet": None}}).startswith("HUSH")


DEAF = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")


@pytest.mark.parametrize(
    ("template", "record", "what"),
    [
        (CHATML, {"messages": AGAIN, "tools": TOOLS}, "tools"),
        (CHATML, {"messages": AGAIN, "documents": [{"text": "x"}]}, "documents"),
        (CHATML, {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": TOOLS}]}, "tool_calls"),
        (CHATML, {"messages": [ASK, {**ANSWER, "reasoning_content": "so"}]}, "reasoning_content"),
        (MARKED.strip(), {"messages": [ASK, {**ANSWER, "thinking": "so"}]}, "thinking"),
        (DEAF, {"messages": [SYSTEM, *AGAIN]}, "message of the role system"),
        (
            QWEN.strip().replace("+ m.content +", "+", 1),
            {"messages": [*AGAIN, {"role": "tool", "content": "ab"}]},
            "message of the role tool",
        ),
    ],
)
def test_what_the_template_would_drop_is_refused_by_its_line(template: str, record: dict[str, Any], what: str) -> None:
    with pytest.raises(Refused, match=f"^line 1: the chat template does not write the {what} of this record"):
        reader_of(template).samples("line 1", record)


def test_thoughts_that_marked_text_drops_are_refused() -> None:
    """Before each turn alone the template has them; what is trained on is the whole."""
    marked = "{% generation %}{{ m.reasoning_content if loop.last }}{{ m.content }}{% endgeneration %}"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + marked
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    thinking = [ASK, {**ANSWER, "reasoning_content": "hmm"}]
    assert "hmm" in text_of(reader_of(template), {"messages": thinking})
    with pytest.raises(Refused, match="does not write the reasoning_content"):
        reader_of(template).samples("line 1", {"messages": [*thinking, *AGAIN[2:]]})


@pytest.mark.parametrize("own", ["continue_final_message", "add_generation_prompt", "messages"])
def test_what_the_renderer_decides_is_not_for_records(own: str) -> None:
    with pytest.raises(Refused, match=f"chat_template_kwargs hold {own}"):
        reader_of(CHATML).samples("line 1", {"messages": AGAIN, "chat_template_kwargs": {own: True}})


def test_a_template_that_fails_is_named() -> None:
    with pytest.raises(Refused, match="cannot write this conversation"):
        reader_of("{{ 1 // 0 }}").samples("line 1", {"messages": AGAIN})


@pytest.mark.parametrize(
    ("key", "given"), [("tools", "no JSON"), ("tools", {"a": 1}), ("functions", "abc"), ("chat_template_kwargs", [1])]
)
def test_what_a_template_cannot_be_given_is_refused(key: str, given: Any) -> None:
    with pytest.raises(Refused, match=f"^line 1: {key} is "):
        reader_of(TOOL_USE).samples("line 1", {"messages": AGAIN, key: given})


def test_one_turn_of_several_that_are_marked_together_cannot_be_left_out() -> None:
    template = "{% generation %}{% for m in messages %}{{ m.content }} {% endfor %}{% endgeneration %}"
    with pytest.raises(Refused, match=r"marks 1 parts of 2 turns"):
        reader_of(template).samples("line 1", {"messages": [*AGAIN[:3], {**AGAIN[3], "weight": 0}]})
