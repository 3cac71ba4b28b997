"""Options: every choice has its YAML and its schema, and the JSON form tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from trainer.compose import compose
from trainer.config import CHOICES, Curve, as_json, as_yaml, choice_of, flatten, option_keys

REQUIRED = {"hf": ["model.path=x"], "text": ["data.path=x"], "jsonl": ["data.path=x"]}


@pytest.mark.parametrize(
    ("group", "choice"), [(path.parent.name, path.stem) for path in sorted((ROOT / "conf").glob("*/*.yaml"))]
)
def test_every_yaml_composes(group: str, choice: str) -> None:
    config = compose([f"{group}={choice}", *REQUIRED.get(choice, [])])
    if group in CHOICES:
        assert choice_of(config, group) == choice


def test_every_schema_has_a_yaml() -> None:
    for group, choices in CHOICES.items():
        assert {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")} == set(choices)
    assert {p.stem for p in (ROOT / "conf" / "schedule").glob("*.yaml")} == {c.name for c in Curve}


def test_json_and_yaml_forms_hold_plain_values(tmp_path: Path) -> None:
    config = compose(["method=lora", "schedule=linear"])
    plain = as_json(config)
    assert plain["schedule"]["curve"] == "linear" and plain["choices"]["method"] == "lora"
    assert yaml.safe_load(as_yaml(config)) == plain


def test_flatten_names_every_option() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {"a.b": 1, "a.c.d": [1], "e": None}
    keys = option_keys(compose([]))
    assert {"train.steps", "optimizer.betas", "resume", "model.num_heads"} <= keys and "choices.model" not in keys
