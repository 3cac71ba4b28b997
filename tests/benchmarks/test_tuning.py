"""The study of methods, at a few steps: its task, its tokenizer, its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tuning import METHODS, Tuned, byte_tokenizer, main, rows_of, split, table
from tests.trainer.methods import conformance


def test_every_published_method_is_in_the_study() -> None:
    assert set(METHODS) == set(conformance.METHODS)


def test_tokens_are_bytes() -> None:
    text = "def f(x):\n\treturn 'é ∑' # \x7f"
    assert byte_tokenizer()(text)["input_ids"] == list(text.encode())


@pytest.mark.usefixtures("long")
def test_modules_are_held_out_whole(tmp_path: Path) -> None:
    counts = split(tmp_path)
    assert counts["train"] > 400 and counts["validation"] > 50 and counts["test"] > 50
    parts = {name: (tmp_path / f"{name}.jsonl").read_text() for name in counts}
    record = json.loads(parts["train"].splitlines()[0])
    assert record["prompt"].lstrip().startswith(("def ", "@")) and '"""' not in record["prompt"].split("\n")[1]


@pytest.mark.usefixtures("long")
def test_it_tunes_and_judges(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--base-steps", "2", "--steps", "13", "--rates", "1", "--samples", "8"]
    assert main([*arguments, "--methods", "lift", "sara"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == [
        f"{what}, {m}" for m in ("lora", "lift", "sara") for what in ("gain", "forgot")
    ]
    assert rows[0]["ratio"] == 1 and all(row["ok"] is None for row in rows)


def test_a_method_that_gains_less_than_half_misses_its_bar() -> None:
    best = [
        Tuned("untouched", 0, 0, 2, 2.0, 1.5),
        Tuned("lora", 1e-3, 10, 1, 1.0, 1.7),
        Tuned("poor", 1e-3, 10, 1, 1.6, 1.5),
        Tuned("good", 1e-3, 10, 1, 1.4, 1.6),
    ]
    judged = {row.name: row.ok for row in rows_of(best, True)}
    assert judged["gain, poor"] is False and judged["gain, good"] is True and judged["forgot, good"] is None
    assert "| good | 10 | 0.001 | 1.4000 | 0.6000 | 0.60 | 1.6000, +0.1000 |" in table(best)
