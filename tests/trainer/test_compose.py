"""The command line to a configuration: what composes, and how refusals read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.compose import compose, compose_from_command_line
from trainer.errors import Refused
from trainer.options.data import Jsonl
from trainer.options.method import Lora
from trainer.options.model import HuggingFace, TinyLlama
from trainer.options.precision import Compute
from trainer.options.schedule import Curve
from trainer.options.tracking import Tracker


def test_the_default_is_the_main_job() -> None:
    config = compose([])
    assert isinstance(config.model, TinyLlama) and config.tracking.tracker is Tracker.wandb
    assert config.run.dir == "runs/main" and config.checkpoint.dir == "runs/main/checkpoints"
    assert config.optimizer.lr == config.model.lr


def test_choices_and_values() -> None:
    config = compose(
        [
            "model=hf",
            "model.path=/some/where",
            "data=jsonl",
            "data.path=x.jsonl",
            "method=lora",
            "schedule=linear",
            "precision=bf16",
            "parallel=fsdp",
            "optimizer.lr=3e-4",
            "run.name=mine",
            "resume_allow=[train.seed,data]",
        ]
    )
    assert isinstance(config.model, HuggingFace) and isinstance(config.data, Jsonl) and isinstance(config.method, Lora)
    assert config.schedule.curve is Curve.linear and config.precision.compute is Compute.bf16
    assert (config.parallel.dp_replicate, config.parallel.dp_shard) == (1, -1)
    assert config.optimizer.lr == 3e-4 and config.checkpoint.dir == "runs/mine/checkpoints"
    assert config.resume_allow == ["train.seed", "data"]


REFUSALS = {
    "nokey=1": "There is no option nokey",
    "train.step=3": r"There is no option train\.step\. Did you mean train\.steps",
    "+train.foo=1": r"There is no option train\.foo",
    "+foo=1": "There is no option foo",
    "~train": r"was removed from the configuration",
    "train.steps=abc": "train.steps=abc does not fit: Value 'abc' of type 'str' could not be converted to Integer",
    "train.steps=1.5": "could not be converted to Integer",
    "train.steps=null": "is not Optional",
    "optimizer.betas=[a,b]": "could not be converted to Float",
    "optimizer.betas=[0.9]": "must be two numbers",
    "run=3": "does not fit",
    "model=nope": r"There is no model=nope\. Choose model=hf\|tiny_llama",
    "model=hf": r"model\.path has no value and no default\. Add model\.path=\.\.\.",
    "data=jsonl": r"data\.path has no value",
    "data.path=x": r"data\.path is an option of data=text, data=jsonl, data=chat and data=hf only\. Choose one",
    "method.r=2": r"method\.r is an option of method=lora only",
    "parallel.engine=megatron": r"Invalid value 'megatron', expected one of \[torch, accelerate, deepspeed\]",
    "run.dir=${nope}": "Interpolation key 'nope' not found",
    "train.global_batch=[": r"The override train\.global_batch=\[ cannot be read: .*viable alternative",
    "optimizer.lr=a=b": r"The override optimizer\.lr=a=b cannot be read: .*Quote a value",
    "novalue": "The override novalue cannot be read: .*",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_refusals_are_one_clear_paragraph(override: str) -> None:
    with pytest.raises(Refused, match=REFUSALS[override]) as refused:
        compose([override])
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("long")
def test_all_of_hydras_flags_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", "--cfg", "job", "train.steps=7"])
    assert compose_from_command_line() is None
    assert "steps: 7" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["trainer", "train.steps=7"])
    config = compose_from_command_line()
    assert config is not None and config.train.steps == 7
    for several in (["--multirun"], ["hydra.mode=MULTIRUN"]):
        monkeypatch.setattr(sys, "argv", ["trainer", *several, "train.seed=1,2"])
        with pytest.raises(Refused, match="--multirun"):
            compose_from_command_line()
    monkeypatch.setattr(sys, "argv", ["trainer", "--help"])
    with pytest.raises(SystemExit) as left:
        compose_from_command_line()
    assert left.value.code == 0 and capsys.readouterr().out.startswith("trainer is powered by Hydra")


PATHS = [
    "größe",
    "新加卷/d",
    "epoch=3",
    "a,b",
    "a[1]",
    "a{1}",
    "a(1)",
    "it's",
    "a#b",
    "a%b",
    "a b",
    "a@b",
    "[a]",
    "a'b,c",
]


@pytest.mark.parametrize("value", ["1e-5", "true", "False", "007", "3", "0.10", "1_000", "NaN", ".5", "-1", *PATHS])
def test_a_text_that_looks_like_something_else_stays_as_it_was_typed(value: str) -> None:
    config = compose([f"run.name={value}", "model=hf", f"model.path={value}"])
    model: Any = config.model
    assert config.run.name == value and config.run.dir == f"runs/{value}" and model.path == value


def test_numbers_and_nulls_stay_what_they_are() -> None:
    config: Any = compose(["optimizer.lr=1e-5", "data=text", "data.path=x", "data.eval_path=null"])
    assert config.optimizer.lr == 1e-5 and config.data.eval_path is None


def test_what_is_quoted_or_refers_to_another_option_stays_so() -> None:
    assert compose(["run.name='a,b'"]).run.name == "a,b" and compose(['run.name="1"']).run.name == "1"
    assert compose(["run.name=${train.steps}x", "train.steps=7"]).run.name == "7x"
    with pytest.raises(Refused, match="cannot be read"):
        compose(["run.name=a'b\"c,d"])


@pytest.mark.parametrize("flag", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_configurations_of_ones_own_lie_where_the_flag_says(flag: list[str], tmp_path: Path) -> None:
    """Launchers compose what the trainer will, with its flags."""
    own = tmp_path / "my conf"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  steps: 77\n")
    assert compose([*(one.format(own) for one in flag), "experiment=mine", "run.name=a"]).train.steps == 77
    with pytest.raises(Refused, match="is no directory"):
        compose(["--config-dir", str(tmp_path / "absent")])
