"""A configuration as JSON and as YAML, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from trainer.check import option_keys
from trainer.compose import compose
from trainer.options.stored import as_json, as_yaml, flatten, from_json


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
    del saved["method"]["lr"], saved["choices"]["optimizer"]  # as an earlier release saved it
    assert from_json(saved).optimizer == config.optimizer


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "${run.dir}", "\\${oc.env:HOME}", "\\\\${oc.env:HOME}", "${", "$\\{x}"]
)
def test_what_a_checkpoint_says_is_text(text: str) -> None:
    """Not something to look up on the machine of whoever reads it."""
    saved = as_json(compose(["model=hf", "model.path=x"]))
    saved["run"]["name"] = saved["model"]["path"] = text
    saved["resume_allow"] = [text]
    config = from_json(saved)
    assert (config.run.name, config.model.path, config.resume_allow) == (text, text, [text])  # type: ignore[attr-defined]


def test_set_up_lines_are_in_no_record() -> None:
    line = "export HF_TOKEN=hf_secret"
    config = compose(["launch=slurm", f"launch.setup=['{line}','module load cuda']"])
    assert config.launch.setup == [line, "module load cuda"]  # type: ignore[attr-defined]
    assert "hf_secret" not in json.dumps(as_json(config)) + as_yaml(config)
    assert as_json(config)["launch"]["setup"] == ["(not recorded)"] * 2


def test_flatten_names_every_option() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {"a.b": 1, "a.c.d": [1], "e": None}
    keys = option_keys(compose([]))
    assert {"train.steps", "optimizer.betas", "resume", "model.num_heads"} <= keys and "choices.model" not in keys
