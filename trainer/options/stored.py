"""A configuration as JSON, as checkpoints hold it, and back; as YAML for a person."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import OmegaConf

from trainer.options.config import CHOICES, Config, choice_of
from trainer.options.launch import SECRET


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train": {"steps": 3}}` as `{"train.steps": 3}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def as_json(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, enumerations by name; of what may be secret only how much there is."""

    def plain(value: Any, key: str = "") -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name), f"{key}.{f.name}".lstrip(".")) for f in fields(value)}
        if key in SECRET:
            return ["(not recorded)"] * len(value)
        if isinstance(value, Enum):
            return value.name
        return list(value) if isinstance(value, list | tuple) else value

    return {**plain(config), "choices": {group: choice_of(config, group) for group in CHOICES}}


def from_json(saved: dict[str, Any]) -> Config:
    """Read a configuration that `as_json` gave; options that a later release added have their defaults.

    It may be a stranger's: text stays text, also where it looks like an interpolation. `ValueError`, `TypeError`,
    `KeyError`, `AttributeError` or an error of OmegaConf's where it is no configuration.
    """
    first = {group: next(iter(known)) for group, known in CHOICES.items()}  # of groups that a later release added
    chosen = {**first, **saved["choices"]}
    if strangers := [f"{group}={name}" for group, name in chosen.items() if name not in CHOICES[group]]:
        raise ValueError(f"{strangers[0]} is not known here; --config-dir DIRECTORY says where its files are")
    choices = {group: CHOICES[group][name]() for group, name in chosen.items()}
    plain = {key: _literal(value) for key, value in saved.items() if key != "choices"}
    merged = OmegaConf.merge(OmegaConf.structured(Config(**choices)), plain)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _literal(value: Any) -> Any:
    """Escape `${`, so that it stands for itself."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: _literal(one) for key, one in value.items()}
    return [_literal(one) for one in value] if isinstance(value, list) else value


def as_yaml(config: Config) -> str:
    """The resolved configuration, for a person."""
    return OmegaConf.to_yaml(OmegaConf.create(as_json(config)))
