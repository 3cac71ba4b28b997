"""`python -m trainer.methods`, on runs of the trainer itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.harness.models import save_tiny_model
from tests.harness.processes import ROOT
from tests.harness.runs import train
from trainer.data.templates import CHATML
from trainer.errors import Refused
from trainer.methods.__main__ import main
from trainer.methods.deltas import DESCRIBED, Delta


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sparse runs and one with promoted weights, of one Hugging Face model."""
    top = tmp_path_factory.mktemp("runs")
    save_tiny_model(top / "base")
    (top / "text.txt").write_text("all work and no play makes jack a dull boy. " * 60)
    shared = ["model=hf", f"model.path={top / 'base'}", "data=text", f"data.path={top / 'text.txt'}", "tracking=none"]
    shared += ["train.steps=4", "train.seq_len=16", "train.global_batch=2", "eval.generate_tokens=0", "eval.samples=2"]
    shared += ["optimizer.lr=0.01", "schedule.warmup_steps=0"]
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (top / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 20)
    talk = ["data=chat", f"data.path={top / 'chat.jsonl'}", "data.template=chatml", "data.eval_fraction=0"]
    talk += ["train.seq_len=64", "eval.every=0"]
    save_chat_tokenizer(top / "base")
    for name, more in (
        ("talks", [*talk, "method=random_sparse", "method.budget_rank=1"]),
        ("talks-lora", [*talk, "method=lora"]),
        ("a", ["method=lift", "method.every=2", "method.budget_rank=1"]),
        ("b", ["method=random_sparse", "method.budget_rank=2"]),
        ("spt", ["method=spt", "method.promote_rank=2", "method.density=0.05"]),
        ("lora", ["method=lora"]),
    ):
        train([*shared, *more, f"run.dir={top / name}"])
    return top


def save_chat_tokenizer(directory: Path) -> None:
    """With a token that ends turns, in a row that the model has."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)


def weights(path: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    return {name: p.detach() for name, p in model.named_parameters()}


def equal(left: Path, right: Path) -> bool:
    a, b = weights(left), weights(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(*arguments: str | Path) -> int:
    return main([str(one) for one in arguments])


@pytest.mark.usefixtures("long")
def test_a_difference_in_and_out_of_a_hugging_face_model(runs: Path, tmp_path: Path) -> None:
    assert run("delta", runs / "a", tmp_path / "a") == 0 and run("merge", runs / "a", tmp_path / "merged") == 0
    assert run("apply", runs / "base", tmp_path / "a", tmp_path / "applied") == 0
    assert equal(tmp_path / "applied", tmp_path / "merged") and not equal(tmp_path / "applied", runs / "base")
    assert run("revert", tmp_path / "merged", tmp_path / "a", tmp_path / "back") == 0
    assert equal(tmp_path / "back", runs / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<end>"
    # Of every entry an index, a value and the original; names and shapes are the rest.
    delta = Delta.load(tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 12 * delta.count + 500 * len(delta.shapes)


@pytest.mark.usefixtures("long")
def test_two_differences_add_up(runs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("delta", runs / name, tmp_path / name) == 0
    assert run("compose", tmp_path / "a", tmp_path / "b", tmp_path / "both") == 0
    assert run("apply", runs / "base", tmp_path / "both", tmp_path / "applied") == 0
    for name in ("a", "b"):
        assert run("merge", runs / name, tmp_path / f"{name}-merged") == 0
    base, a, b, both = (
        weights(p) for p in (runs / "base", tmp_path / "a-merged", tmp_path / "b-merged", tmp_path / "applied")
    )
    for name, start in base.items():
        torch.testing.assert_close(both[name] - start, (a[name] - start) + (b[name] - start), rtol=1e-5, atol=1e-7)
    assert run("revert", tmp_path / "applied", tmp_path / "both", tmp_path / "back") == 0
    assert equal(tmp_path / "back", runs / "base")


def test_statistics_of_a_run_and_of_the_difference_of_two(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", runs / "b", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["selected"] == sum(row["selected"] for row in found["layers"]) > 0
    assert run("stats", runs / "a", runs / "a") == 0
    assert "100.000% equal, 100.000% within 1e-5" in capsys.readouterr().out.splitlines()[-1]
    assert run("stats", runs / "a", runs / "lora", "--json") == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert 0 < total["equal"] < total["numel"] and total["equal"] <= total["close"]
    assert run("stats", runs / "b") == 0
    assert "of" in capsys.readouterr().out


def test_what_cannot_be_done_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("delta", runs / "spt", tmp_path / "spt") == 0 and run("merge", runs / "spt", tmp_path / "merged") == 0
    assert run("apply", runs / "base", tmp_path / "spt", tmp_path / "applied") == 0
    assert equal(tmp_path / "applied", tmp_path / "merged")
    assert run("delta", runs / "b", tmp_path / "b") == 0
    for arguments, why in (
        (("revert", tmp_path / "merged", tmp_path / "spt", tmp_path / "x"), "was changed by a low-rank pair"),
        (("revert", runs / "base", tmp_path / "b", tmp_path / "x"), "does not hold this delta"),
        (("apply", tmp_path / "merged", tmp_path / "b", tmp_path / "x"), "is not what the delta was trained on"),
        (("apply", tmp_path, tmp_path / "b", tmp_path / "x"), "is no Hugging Face directory"),
        (("compose", tmp_path / "b", tmp_path / "x"), "compose takes at least two files"),
        (("stats", tmp_path / "nowhere"), "holds no committed generation"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
        assert not (tmp_path / "x").exists()


def test_an_adapter_as_peft_loads_it(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adapter", runs / "lora", tmp_path / "adapter") == 0 and run("merge", runs / "lora", tmp_path / "m") == 0
    tokens = torch.arange(14)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(tokens).logits

    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (runs / "base", tmp_path / "m"))
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(adapted, logits(merged), rtol=1e-5, atol=1e-5)
    assert float((adapted - before).abs().max()) > 1e-3
    assert run("adapter", runs / "a", tmp_path / "none") == 2
    assert "A run of method=lift has no adapter. `merge` writes" in capsys.readouterr().err


@pytest.mark.usefixtures("long")
def test_what_was_trained_beside_weights_comes_out_by_every_way(runs: Path, tmp_path: Path) -> None:
    """The template, the token that ends a turn, and a tokenizer; in files that others may read."""
    assert run("merge", runs / "talks", tmp_path / "merged") == 0
    assert run("delta", runs / "talks", tmp_path / "delta") == 0
    assert run("apply", runs / "base", tmp_path / "delta", tmp_path / "applied") == 0
    assert run("revert", tmp_path / "applied", tmp_path / "delta", tmp_path / "back") == 0
    assert run("adapter", runs / "talks-lora", tmp_path / "adapter") == 0
    assert run("merge", runs / "talks-lora", tmp_path / "merged-lora") == 0
    for name in ("merged", "applied", "adapter", "merged-lora"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.chat_template == CHATML, name
        ends = GenerationConfig.from_pretrained(tmp_path / name).eos_token_id
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ([ends] if isinstance(ends, int) else ends), name
    assert AutoTokenizer.from_pretrained(tmp_path / "back").eos_token == "<end>"
    for name in DESCRIBED:  # as the base has them
        before = runs / "base" / name
        assert before.exists() == (tmp_path / "back" / name).exists(), name
        assert not before.exists() or before.read_text() == (tmp_path / "back" / name).read_text()
    os.umask(mask := os.umask(0))
    for path in [tmp_path / "delta", *tmp_path.glob("*/*.safetensors")]:
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


@pytest.mark.usefixtures("long")
def test_nothing_of_a_strangers_run_is_taken_but_how_it_speaks(runs: Path, tmp_path: Path) -> None:
    """Not what a link leads to, not code, and no other adapter's configuration."""
    (tmp_path / "secret").write_text("a private key")
    for name in ("talks", "talks-lora"):
        shutil.copytree(runs / name, tmp_path / name)
        for file, text in (("adapter_config.json", "{}"), ("evil.py", "raise SystemExit")):
            (tmp_path / name / "hf" / file).write_text(text)
        (tmp_path / name / "hf" / "chat_template.jinja").unlink()
        (tmp_path / name / "hf" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    base = ["--base", runs / "base"]
    assert run("delta", tmp_path / "talks", tmp_path / "delta", *base) == 0
    assert b"private" not in (tmp_path / "delta").read_bytes()
    assert run("adapter", tmp_path / "talks-lora", tmp_path / "adapter", *base) == 0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert run("merge", tmp_path / "talks", tmp_path / "merged", *base) == 0
    for place in ("adapter", "merged"):
        assert not (tmp_path / place / "evil.py").exists() and not (tmp_path / place / "chat_template.jinja").exists()


@pytest.mark.usefixtures("long")
def test_a_model_in_its_own_place_keeps_its_tokenizer(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "m")
    assert run("delta", runs / "b", tmp_path / "b") == 0
    assert run("apply", tmp_path / "m", tmp_path / "b", tmp_path / "m") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "m").eos_token == "<end>"


@pytest.mark.parametrize("told", [{"../x": "a"}, {"chat_template.jinja": 3}, {"chat_template.jinja": "x" * 2**21}])
def test_a_file_that_describes_more_than_it_may_is_refused(runs: Path, tmp_path: Path, told: Any) -> None:
    assert run("delta", runs / "b", tmp_path / "b") == 0
    delta = Delta.load(tmp_path / "b")
    delta.described = told
    delta.save(tmp_path / "evil")
    with pytest.raises(Refused, match="describes more than a template"):
        Delta.load(tmp_path / "evil")


@pytest.mark.usefixtures("processes")
def test_nothing_is_said_that_nobody_can_act_upon(runs: Path, tmp_path: Path) -> None:
    """Libraries warn of kernels for other machines, of each other, and of an accelerator that is not there."""
    for words in (["merge", str(runs / "lora"), "m"], ["adapter", str(runs / "lora"), "a"]):
        command = [sys.executable, "-m", "trainer.methods", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1, done.stderr
