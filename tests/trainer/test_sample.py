"""The text at the end: drawn alike on all ranks, and by the seed."""

from __future__ import annotations

from pathlib import Path

from tests.runs import SMALL
from tests.worlds import WORLD, train


def sampled(output: str) -> str:
    return output.partition("--- goes on ---")[2]


def test_the_text_follows_from_the_seed_and_not_from_the_layout(tmp_path: Path) -> None:
    common = [*SMALL, "train.steps=1", "eval.generate_tokens=20"]
    alone = sampled(train([*common, f"run.dir={tmp_path / 'a'}"]))
    assert len(alone.strip()) > 0
    assert sampled(train([*common, f"run.dir={tmp_path / 'b'}"])) == alone
    assert sampled(train([*common, f"run.dir={tmp_path / 'c'}", "train.seed=1"])) != alone
    outputs = WORLD.run(train, 3, [*common, "parallel=fsdp", f"run.dir={tmp_path / 'd'}"], environment=True)
    assert [sampled(output) for output in outputs] == [alone, "", ""]


def test_without_anything_held_out_the_prompt_is_training_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 50)
    overrides = [*SMALL, "data=text", f"data.path={tmp_path / 'text'}", "data.eval_fraction=0", "train.steps=1"]
    output = train([*overrides, "eval.generate_tokens=5", f"run.dir={tmp_path / 'run'}"])
    assert "nothing is held out" in output and "abcdefghabcdefgh" in output
