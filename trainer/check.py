"""Hydra's configuration becomes plain dataclasses, and is checked: no DictConfig travels further."""

from __future__ import annotations

import functools
import os
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any, Optional, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from trainer.errors import Refused
from trainer.options.config import CHOICES, Config, choice_of, method_name
from trainer.options.data import Stdlib
from trainer.options.launch import LocalLaunch
from trainer.options.method import Full
from trainer.options.model import TinyLlama
from trainer.options.optimizer import Implementation, Optimizer
from trainer.options.precision import Compute
from trainer.options.stored import as_json, flatten


@functools.cache
def register() -> None:
    """Make the schemas known to Hydra, so that unknown keys and wrong types are refused when it composes."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, choices in CHOICES.items():
        for name, schema in choices.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def from_hydra(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses, checked. `Refused` names the override to type."""
    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "an option"
        raise Refused(f"{key} has no value and no default. Add {key}=... to the command.") from None
    assert isinstance(config, Config)
    # `+key=value` adds to a Hydra configuration even where the schema knows no such key, and `~key` takes away.
    given, known = set(flatten(OmegaConf.to_container(composed))), option_keys(config)
    if unknown := sorted(given - known):
        raise Refused(unknown_key(unknown[0]))
    if removed := sorted(known - given):
        raise Refused(f"{removed[0]} was removed from the configuration. Leave out the override that starts with ~.")
    config = _at_home(config)
    assert isinstance(config, Config)
    check(config)
    return config


def _at_home(part: Any) -> Any:
    """Expand the `~/` that paths begin with: a shell does so before `--flag ~/x` alone."""
    found = {f.name: getattr(part, f.name) for f in fields(part)}
    for name, value in found.items():
        if is_dataclass(value):
            found[name] = _at_home(value)
        elif isinstance(value, str) and (value == "~" or value.startswith("~/")):
            found[name] = os.path.expanduser(value)
            if found[name].startswith("~"):
                raise Refused(
                    f"{value} is below the home directory, and this user has none here. Set HOME, or type the path "
                    "from / on."
                )
    return replace(part, **found)


def option_keys(config: Config) -> set[str]:
    """The dotted names of all options under the choices that were made."""
    return set(flatten({key: value for key, value in as_json(config).items() if key != "choices"}))


def unknown_key(key: str) -> str:
    """Why an option is refused, and what may have been meant."""
    group, _, name = key.partition(".")
    owners = [
        f"{group}={c}" for c, schema in CHOICES.get(group, {}).items() if name in {f.name for f in fields(schema)}
    ]
    if owners:
        *others, last = owners
        among = f"{', '.join(others)} and {last}" if others else last
        return f"{key} is an option of {among} only. Choose {'one of them' if others else last}, or leave it out."
    known = set().union(*(option_keys(config) for config in _one_of_each_choice()))
    close = get_close_matches(key, sorted(known), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`python -m trainer --cfg job` prints every option."
    return f"There is no option {key}. {hint}"


TEXT = (str, Optional[str])


def text_keys() -> set[str]:
    """The options whose values are texts, in any choice of their group."""
    return set().union(*(_texts_of(config) for config in _one_of_each_choice()))


def _texts_of(part: Any, prefix: str = "") -> set[str]:
    hints = get_type_hints(type(part))
    found = {f"{prefix}{f.name}" for f in fields(part) if hints[f.name] in TEXT}
    deeper = {f.name: getattr(part, f.name) for f in fields(part)}
    return found.union(*(_texts_of(v, f"{prefix}{name}.") for name, v in deeper.items() if is_dataclass(v)))


def _one_of_each_choice() -> list[Config]:
    default = Config(model=TinyLlama(), data=Stdlib(), method=Full(), launch=LocalLaunch())
    return [replace(default, **{group: schema()}) for group, choices in CHOICES.items() for schema in choices.values()]


def check(config: Config) -> None:
    """The bounds of every number, every group's own rules, and those across groups. Sizes of the world: plan.py."""
    _check_bounds(config, "")
    _check_optimizer_of_method(config)
    for group in fields(config):
        if (refuse := getattr(getattr(config, group.name), "refuse", None)) is not None:
            refuse()
    known = option_keys(config) | set(CHOICES)
    for key in config.resume_allow:
        if not any(k == key or k.startswith(f"{key}.") for k in known):
            raise Refused(f"resume_allow names {key}. {unknown_key(key)}")
    _check_fp16(config)


def _check_optimizer_of_method(config: Config) -> None:
    """Entries that are chosen anew have an optimizer of their own; those that are not are too few to keep in 8 bits."""
    kind, method = config.optimizer.implementation, config.method
    if method.brings_optimizer and type(config.optimizer) is not Optimizer:
        raise Refused(
            f"optimizer={choice_of(config, 'optimizer')} would not be used: method={method_name(config)} has an "
            "optimizer of its own. Type optimizer=adamw."
        )
    blocks = method.trains_entries and kind is Implementation.torchao_8bit
    if blocks or (method.brings_optimizer and kind is not Implementation.fused):
        raise Refused(
            f"optimizer.implementation={kind.value} is for whole matrices, and method={method_name(config)} trains "
            "single entries. Type optimizer.implementation=fused."
        )


def _check_fp16(config: Config) -> None:
    """A gradient that overflowed would decide for good what trains, and a loss scale would shrink penalties."""
    if config.precision.compute is Compute.fp16 and config.method.reads_gradients:
        raise Refused(
            f"method={method_name(config)} looks at gradients or adds a penalty to them, which precision=fp16 scales. "
            "Type precision=bf16."
        )


def _check_bounds(options: Any, prefix: str) -> None:
    for f in fields(options):
        value, key = getattr(options, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            _check_bounds(value, f"{key}.")
        elif "low" in f.metadata and not (f.metadata["low"] <= value <= f.metadata["high"] and isfinite(value)):
            low, high = f.metadata["low"], f.metadata["high"]
            wanted = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
            wanted = wanted if isfinite(value) else f"a finite number, {wanted}"
            raise Refused(f"{key}={value} must be {wanted}. Type {key}={low} or more.")
