"""Options: every choice has its YAML and its schema, and the JSON form tells them apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from trainer.compose import compose
from trainer.config import CHOICES, Curve, as_json, as_yaml, choice_of, flatten, from_json, method_name, option_keys

REQUIRED = {
    "selective": ["method.parameters=[norm]"],
    "hf": ["model.path=x"],
    "text": ["data.path=x"],
    "jsonl": ["data.path=x"],
}


@pytest.mark.parametrize(
    ("group", "choice"), [(path.parent.name, path.stem) for path in sorted((ROOT / "conf").glob("*/*.yaml"))]
)
def test_every_yaml_composes(group: str, choice: str) -> None:
    config = compose([f"{group}={choice}", *REQUIRED.get(choice, [])])
    if group == "method":  # published methods share the options of what they are made of
        assert method_name(config) == choice
    elif group in CHOICES:
        assert choice_of(config, group) == choice


def test_every_schema_has_a_yaml() -> None:
    for group, choices in CHOICES.items():
        there = {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")}
        assert there >= set(choices) if group == "method" else there == set(choices)
    assert {p.stem for p in (ROOT / "conf" / "schedule").glob("*.yaml")} == {c.name for c in Curve}


def test_json_and_yaml_forms_hold_plain_values(tmp_path: Path) -> None:
    config = compose(["method=lora", "schedule=linear"])
    plain = as_json(config)
    assert plain["schedule"]["curve"] == "linear" and plain["choices"]["method"] == "lora"
    assert yaml.safe_load(as_yaml(config)) == plain


@pytest.mark.parametrize("overrides", [["method=lift", "precision=bf16"], ["model=hf", "model.path=x", "method=lora"]])
def test_a_configuration_comes_back_from_its_json(overrides: list[str]) -> None:
    config = compose(overrides)
    saved = json.loads(json.dumps(as_json(config)))
    assert from_json(saved) == config
    del saved["method"]["lr"]  # as an earlier release saved it
    assert from_json(saved).optimizer == config.optimizer


def test_a_method_suggests_what_the_optimizer_takes_where_nothing_else_is_given() -> None:
    assert compose(["method=lift"]).optimizer.lr == 1e-4 and compose(["method=lift"]).optimizer.weight_decay == 0
    assert compose([]).optimizer.lr == 1e-3 and compose([]).optimizer.weight_decay == 0.1
    assert compose(["method=lift", "optimizer.lr=0.5"]).optimizer.lr == 0.5


def test_flatten_names_every_option() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {"a.b": 1, "a.c.d": [1], "e": None}
    keys = option_keys(compose([]))
    assert {"train.steps", "optimizer.betas", "resume", "model.num_heads"} <= keys and "choices.model" not in keys
