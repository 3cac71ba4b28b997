"""`python -m trainer.data preview`: what is learned is told from what is not, and refusals are a paragraph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.data.__main__ import main, written
from trainer.data.dataset import Sample
from trainer.data.tokenizer import ByteTokenizer


def test_samples_with_what_is_learned_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "[4]"}]}] * 4
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = ["data=chat", f"data.path={path}", "data.template=chatml", "data.eval_fraction=0"]
    assert main(["preview", "-n", "2", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "4 records of messages, loss on the assistant's turns" in shown
    assert shown.count("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦[4]<|im_end|>") == 2
    assert main(["preview", *overrides, "data.template="]) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("trainer.data: This model's tokenizer has no chat template") and refused.count("\n") == 1


def test_on_a_terminal_what_is_not_learned_is_dim() -> None:
    text = written(Sample(np.array([72, 105, 33]), np.array([False, True, True])), ByteTokenizer(), marks=False)
    assert text.plain == "Hi!" and [(span.start, span.end, span.style) for span in text.spans] == [(0, 1, "dim")]
