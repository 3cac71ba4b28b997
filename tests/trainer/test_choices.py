"""Groups where one of several is chosen: every choice has its YAML and its schema."""

from __future__ import annotations

import pytest

from tests.harness.processes import ROOT
from trainer.choices import CHOICES
from trainer.compose import compose
from trainer.config import Curve, choice_of, method_name

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
        assert choice_of(config, group) == choice


def test_every_schema_has_a_yaml() -> None:
    for group, choices in CHOICES.items():
        there = {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")}
        assert there >= set(choices) if group == "method" else there == set(choices)
    assert {p.stem for p in (ROOT / "conf" / "schedule").glob("*.yaml")} == {c.name for c in Curve}


def test_a_method_suggests_what_the_optimizer_takes_where_nothing_else_is_given() -> None:
    assert compose(["method=lift"]).optimizer.lr == 1e-4 and compose(["method=lift"]).optimizer.weight_decay == 0
    assert compose([]).optimizer.lr == 1e-3 and compose([]).optimizer.weight_decay == 0.1
    assert compose(["method=lift", "optimizer.lr=0.5"]).optimizer.lr == 0.5
