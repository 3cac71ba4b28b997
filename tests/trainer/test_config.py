"""The names by which other code has the configuration."""

from __future__ import annotations

import trainer.config as face
from trainer.compose import compose


def test_a_configuration_goes_out_and_comes_back() -> None:
    config = compose(["train.steps=7", "method=lora"])
    assert isinstance(config, face.Config) and face.choice_of(config, "method") == "lora"
    assert face.from_json(face.as_json(config)) == config
    assert face.flatten(face.as_json(config))["train.steps"] == 7 and "steps: 7" in face.as_yaml(config)
    assert face.is_free(config, "parallel.tp") and not face.is_free(config, "train.seed")


def test_every_name_is_there() -> None:
    assert all(hasattr(face, name) for name in face.__all__)
