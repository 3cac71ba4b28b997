"""The bounds of options and the rules across them, and how their refusals read."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.compose import compose
from trainer.errors import Refused

REFUSALS = {
    "train.epochs=0": r"train\.epochs=0\.0 must be above 0",
    "data.ratio=0.5": r"data\.ratio=0\.5 is an option of data\.order=rs2",
    "eval.patience=-1": r"eval\.patience=-1 must be at least 0",
    "train.profile=5": r"train\.profile=5 is no FIRST:LAST of steps",
    "train.profile=5\\:4": r"is no FIRST:LAST of steps",
    "train.steps=0": r"train\.steps=0 must be at least 1",
    "optimizer.lr=-1": r"optimizer\.lr=-1.0 must be at least 0",
    "optimizer.lr=nan": "must be a finite number, at least 0",
    "optimizer.lr=inf": "must be a finite number, at least 0",
    "optimizer.lr_scale=[a]": r"lr_scale=a is no pattern:factor .* 'optimizer\.lr_scale=\[\"lm_head:0\.1\"\]'",
    "optimizer.lr_scale=[a:x]": r"lr_scale=a:x is no pattern:factor \(could not convert",
    "optimizer.lr_scale=[a:-1]": r"lr_scale=a:-1 is no pattern:factor \(it has no factor from 0 on",
    "optimizer.lr_scale=['(a:1']": r"lr_scale=\(a:1 is no pattern:factor \(missing \)",
    "run.name=": r"run\.name and run\.dir must not be empty",
    "resume_allow=[optimizer.lrr]": r"resume_allow names optimizer\.lrr\. There is no option .*optimizer\.lr",
    "model.dropout=1.5": r"model\.dropout=1\.5 must be between 0 and 1",
    "model.vocab_size=255": r"model\.vocab_size=255 must be at least 256",
    "model.hidden_size=100": r"Type model\.hidden_size=96",
    "model.num_kv_heads=3": r"is not a multiple of model\.num_kv_heads=3",
    "elastic.signal=KILL": r"elastic\.signal=KILL is no signal that can warn",
    "elastic.grace_s=-1": r"elastic\.grace_s=-1.0 must be at least 0",
    "launch.nodes=2": r"launch\.nodes is an option of launch=torchrun and launch=slurm only",
    "checkpoint.keep=0": r"checkpoint\.keep=0 must be at least 1",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_refusals_are_one_clear_paragraph(override: str) -> None:
    with pytest.raises(Refused, match=REFUSALS[override]) as refused:
        compose([override])
    assert "\n" not in str(refused.value)


def test_a_user_without_a_home_directory_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a number."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])
    assert compose([]).run.dir
    with pytest.raises(Refused, match=r"~/runs/a is below the home directory, and this user has none here. Set HOME"):
        compose(["run.dir=~/runs/a"])


def test_a_home_directory_is_found_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["run.dir=~/runs/a", "resume=~/runs/b", "data=jsonl", "data.path=~/d.jsonl", "data.cache=~/cache"]
    config: Any = compose([*words, "checkpoint.memory.dir=~/memory", "run.name=~a", "model=hf", "model.path=~/m"])
    assert (config.run.dir, config.checkpoint.dir) == ("/home/me/runs/a", "/home/me/runs/a/checkpoints")
    assert (config.resume, config.data.path, config.data.cache) == (
        "/home/me/runs/b",
        "/home/me/d.jsonl",
        "/home/me/cache",
    )
    assert (config.checkpoint.memory.dir, config.model.path) == ("/home/me/memory", "/home/me/m")
    assert config.run.name == "~a"
