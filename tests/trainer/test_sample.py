"""The text at the end: drawn alike on all ranks, and by the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.harness.models import save_tiny_model
from tests.harness.runs import SMALL, train
from tests.harness.worlds import SharedWorld
from trainer.data.dataset import Records, predicted
from trainer.sample import choose_prompt


def sampled(output: str) -> str:
    return output.partition("--- goes on ---")[2]


def test_the_text_follows_from_the_seed_and_not_from_the_layout(tmp_path: Path, world: SharedWorld) -> None:
    common = [*SMALL, "train.steps=1", "eval.generate_tokens=20"]
    alone = sampled(train([*common, f"run.dir={tmp_path / 'a'}"]))
    assert len(alone.strip()) > 0
    assert sampled(train([*common, f"run.dir={tmp_path / 'b'}"])) == alone
    assert sampled(train([*common, f"run.dir={tmp_path / 'c'}", "train.seed=1"])) != alone
    outputs = world.run(train, 3, [*common, "parallel=fsdp", f"run.dir={tmp_path / 'd'}"], environment=True)
    assert [sampled(output) for output in outputs] == [alone, "", ""]


def test_without_anything_held_out_the_prompt_is_training_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 50)
    overrides = [*SMALL, "data=text", f"data.path={tmp_path / 'text'}", "data.eval_fraction=0", "train.steps=1"]
    output = train([*overrides, "eval.generate_tokens=5", f"run.dir={tmp_path / 'run'}"])
    assert "nothing is held out" in output and "abcdefghabcdefgh" in output


def test_a_records_prompt_is_what_the_completion_follows() -> None:
    tokens = np.arange(10)
    records = Records([predicted(tokens, 6)], 16)
    assert choose_prompt(records, 9, 48).tolist() == [0, 1, 2, 3, 4, 5]
    assert choose_prompt(records, 9, 2).tolist() == [4, 5]
    text = Records([predicted(tokens, 1)], 16)
    assert choose_prompt(text, 9, 48).tolist() == list(range(9))  # without its end
    assert choose_prompt(text, 9, 4).tolist() == [0, 1, 2, 3]
    assert choose_prompt(Records([predicted(tokens[-2:], 1)], 16), 9, 1).tolist() == [8]


def test_the_text_stays_within_the_models_positions(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "gpt2")  # 64 positions, and an embedding for each
    (tmp_path / "text").write_text("abcdefgh" * 50)
    data = ["data=text", f"data.path={tmp_path / 'text'}", "train.seq_len=60", "tracking=none"]
    model = ["model=hf", f"model.path={tmp_path / 'model'}", "train.steps=1", "train.global_batch=2"]
    output = train([*data, *model, f"run.dir={tmp_path / 'run'}", "eval.generate_tokens=500"])
    assert len(sampled(output).strip("\n")) > 0
