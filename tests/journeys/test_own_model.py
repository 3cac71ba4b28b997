"""A user's own model and records: Hugging Face directories with tied weights and an odd vocabulary, on any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.harness.models import save_tiny_model
from tests.harness.runs import assert_same_run, rows, train
from tests.harness.worlds import SharedWorld


def own_data(directory: Path) -> list[str]:
    records = directory / "records.jsonl"
    lines = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(200)]
    records.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "x" * 300}]))
    return ["data=jsonl", f"data.path={records}", "data.eval_fraction=0.2"]


@pytest.mark.parametrize("method", ["method=full", "method=lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_train_resume_and_sample(kind: str, method: str, tmp_path: Path, world: SharedWorld) -> None:
    save_tiny_model(tmp_path / "model", kind)
    common = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        *own_data(tmp_path),
        method,
        "train.steps=8",
        "train.global_batch=6",
        "train.seq_len=24",
        "checkpoint.every=4",
        "eval.generate_tokens=12",
        "eval.samples=10",
        "optimizer.lr=1e-3",
        "data.log_ids=true",
        "tracking=none",
    ]
    a, b = tmp_path / "a", tmp_path / "b"
    said = train([*common, f"run.dir={a}"])
    assert "token 257" not in said and "--- goes on ---" in said
    # Dropout is part of GPT-2: the same draws wherever a micro-batch is computed.
    world.run(train, 2, [*common, f"run.dir={b}"], environment=True)
    shutil.rmtree(next((b / "checkpoints").glob("step-00000008-*")))  # as if it had not come to its end
    outputs = world.run(train, 3, [*common, "parallel=fsdp", f"run.dir={b}"], environment=True)
    assert "4 steps after step 4 are rolled back" in outputs[0]
    assert_same_run(rows(a), rows(b), last=8)
    assert sum("--- goes on ---" in output for output in outputs) == 1
    assert f"method={method.partition('=')[2]} trains" in outputs[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_layout_gives_the_same_losses(kind: str, tmp_path: Path, world: SharedWorld) -> None:
    save_tiny_model(tmp_path / "model", kind)
    common = [
        "model=hf",
        f"model.path={tmp_path / 'model'}",
        *own_data(tmp_path),
        "train.steps=6",
        "train.global_batch=6",
        "train.seq_len=24",
        "eval.generate_tokens=0",
        "eval.samples=10",
        "optimizer.lr=1e-3",
        "data.log_ids=true",
        "tracking=none",
    ]
    train([*common, f"run.dir={tmp_path / 'alone'}"])
    for size, layout in ((2, "parallel=ddp"), (3, "parallel=fsdp")):
        run_dir = tmp_path / layout.partition("=")[2]
        world.run(train, size, [*common, layout, f"run.dir={run_dir}"], environment=True)
        assert_same_run(rows(tmp_path / "alone"), rows(run_dir), last=6)
        assert rows(run_dir)[-1]["eval_loss"] == pytest.approx(rows(tmp_path / "alone")[-1]["eval_loss"], rel=1e-5)
    train([*common, "train.seed=1", f"run.dir={tmp_path / 'other'}"])
    with pytest.raises(AssertionError):
        assert_same_run(rows(tmp_path / "alone"), rows(tmp_path / "other"), last=6)


def read_other_data(directory: Path) -> str:
    import os

    from trainer.errors import Refused

    path = directory / f"{os.environ['RANK']}.txt"
    path.write_text("abc" * 500 + os.environ["RANK"])
    try:
        return train(["data=text", f"data.path={path}", f"run.dir={directory / 'run'}", "tracking=none"])
    except Refused as error:
        return str(error)


def test_ranks_that_read_other_data_are_refused_together(tmp_path: Path, world: SharedWorld) -> None:
    messages = world.run(read_other_data, 3, tmp_path, environment=True)
    assert len(set(messages)) == 1 and messages[0].startswith("Ranks [1, 2] read other data than rank 0.")
