"""Groups where one of several is chosen: every choice has its YAML and its schema."""

from __future__ import annotations

import pytest

from tests.harness.processes import ROOT
from trainer.compose import compose
from trainer.options.config import CHOICES, choice_of, is_free, method_name
from trainer.options.schedule import Curve

REQUIRED = {
    "selective": ["method.parameters=[norm]"],
    "hf": ["model.path=x"],
    "data=hf": ["data.path=x"],
    "text": ["data.path=x"],
    "jsonl": ["data.path=x"],
    "chat": ["data.path=x"],
    "llama_1b": ["data.path=x"],
    "llama_8b": ["data.path=x"],
    "llama_8b_lora": ["data.path=x"],
    "llama_70b_lora": ["data.path=x"],
}


@pytest.mark.parametrize(
    ("group", "choice"), [(path.parent.name, path.stem) for path in sorted((ROOT / "conf").glob("*/*.yaml"))]
)
def test_every_yaml_composes(group: str, choice: str) -> None:
    config = compose([f"{group}={choice}", *REQUIRED.get(f"{group}={choice}", REQUIRED.get(choice, []))])
    if group == "method":  # published methods share the options of what they are made of
        assert method_name(config) == choice
    elif group in CHOICES:
        assert choice_of(config, group) == (choice if choice in CHOICES[group] else next(iter(CHOICES[group])))


def test_every_schema_has_a_yaml() -> None:
    for group, choices in CHOICES.items():
        there = {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")}
        several = group in ("method", "optimizer")  # of which some have the same options
        assert there >= set(choices) if several else there == set(choices)
    assert {p.stem for p in (ROOT / "conf" / "schedule").glob("*.yaml")} == {c.name for c in Curve}


def test_a_method_suggests_what_the_optimizer_takes_where_nothing_else_is_given() -> None:
    assert compose(["method=lift"]).optimizer.lr == 1e-4 and compose(["method=lift"]).optimizer.weight_decay == 0
    assert compose([]).optimizer.lr == 1e-3 and compose([]).optimizer.weight_decay == 0.1
    assert compose(["method=lift", "optimizer.lr=0.5"]).optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("key", "free"),
    [
        *((key, True) for key in ("run.name", "resume", "resume_allow", "dry_run", "launch", "launch.nproc")),
        *((key, True) for key in ("parallel.tp", "checkpoint.memory.every", "elastic.signal", "tracking.tracker")),
        *((key, True) for key in ("eval.samples", "data.path", "data.eval_path", "data.log_ids", "data.cache")),
        *((key, True) for key in ("data.workers", "model.path", "model.lr", "model.attention", "method.lr")),
        *((key, True) for key in ("method.weight_decay", "train.deterministic", "train.profile", "train.epochs")),
        *(
            (key, False)
            for key in ("train.steps", "train.seed", "train.global_batch", "optimizer.lr", "optimizer.clip")
        ),
        *((key, False) for key in ("data", "data.pack", "data.text_field", "model", "model.hidden_size", "method")),
        *((key, False) for key in ("method.r", "method.density", "precision.compute", "schedule.curve", "unknown.key")),
    ],
)
def test_what_a_run_may_go_on_with(key: str, free: bool) -> None:
    config = compose(["data=chat", "data.path=x", "model=hf", "model.path=x"])
    assert is_free(config, key) == free
