"""What Hydra composed as plain dataclasses, and the rules that it must keep: no DictConfig travels further."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from math import isfinite
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from trainer.choices import CHOICES, Full, Growth, LocalLaunch, Order, Reselection, Selector, Sparse, Stdlib, TinyLlama
from trainer.config import Compute, Config, Implementation, as_json, flatten
from trainer.elastic.preemption import warnings_of
from trainer.errors import Refused


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
    """With the home directory for the `~/` that paths begin with, as a shell puts it before `--flag ~/x` alone."""
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


TEXT = ("str", "str | None", "Optional[str]")  # as annotations have it


def text_keys() -> set[str]:
    """The options whose values are texts, in any choice of their group."""
    return set().union(*(_texts_of(config) for config in _one_of_each_choice()))


def _texts_of(part: Any, prefix: str = "") -> set[str]:
    found = {f"{prefix}{f.name}" for f in fields(part) if f.type in TEXT}
    deeper = {f.name: getattr(part, f.name) for f in fields(part)}
    return found.union(*(_texts_of(v, f"{prefix}{name}.") for name, v in deeper.items() if is_dataclass(v)))


def _one_of_each_choice() -> list[Config]:
    default = Config(model=TinyLlama(), data=Stdlib(), method=Full(), launch=LocalLaunch())
    return [replace(default, **{group: schema()}) for group, choices in CHOICES.items() for schema in choices.values()]


def check(config: Config) -> None:
    """The bounds of every number, and the rules across fields. Sizes of the world are checked in plan.py."""
    _check_bounds(config, "")
    if not config.run.name.strip() or not config.run.dir.strip():
        raise Refused("run.name and run.dir must not be empty. Type run.name=NAME.")
    for key, name in {
        "run.name": config.run.name,
        "run.dir": config.run.dir,
        "checkpoint.dir": config.checkpoint.dir,
    }.items():
        if not name.isprintable():  # in a job's script, a log or a terminal it would be more than a name
            raise Refused(f"{key}={name!r} holds a line break or a control character. Type {key}=NAME without it.")
    known = option_keys(config) | set(CHOICES)
    for key in config.resume_allow:
        if not any(k == key or k.startswith(f"{key}.") for k in known):
            raise Refused(f"resume_allow names {key}. {unknown_key(key)}")
    if config.data.ratio != 1 and config.data.order is not Order.rs2:
        raise Refused(f"data.ratio={config.data.ratio} is an option of data.order=rs2. Type both, or leave it out.")
    if config.train.epochs is not None and not 0 < config.train.epochs < 1e9:
        raise Refused(f"train.epochs={config.train.epochs} must be above 0. Type train.epochs=3, or train.steps alone.")
    if config.eval.generate_every and not config.eval.generate_tokens:
        raise Refused("eval.generate_every asks for texts, and eval.generate_tokens=0 for none. Leave one of them out.")
    window_of(config.train.profile)
    if config.eval.patience and not config.eval.every:
        raise Refused("eval.patience counts evaluations, and eval.every=0 makes none. Type eval.every=100 with it.")
    betas, model = config.optimizer.betas, config.model
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise Refused(f"optimizer.betas={betas} must be two numbers in [0, 1), such as optimizer.betas=[0.9,0.95].")
    rates_by_pattern(config.optimizer.lr_scale)
    try:
        warnings_of(config.elastic.signal)
    except ValueError:
        raise Refused(
            f"elastic.signal={config.elastic.signal} is no signal that can warn. Type USR1 or USR2."
        ) from None
    if isinstance(model, TinyLlama):
        _check_heads(model)
    _check_fp16(config)
    parallel = config.parallel
    kind, method = config.optimizer.implementation, config.method
    if isinstance(method, Sparse) and kind is not Implementation.fused:
        # Entries that are chosen anew have an optimizer of our own; those that are not are too few to keep in 8 bits.
        own = method.schedule not in (Reselection.once, Reselection.rewind)
        if own or kind is Implementation.torchao_8bit:
            raise Refused(
                f"optimizer.implementation={kind.value} is for whole matrices, and method={method.name} trains single "
                "entries. Type optimizer.implementation=fused."
            )
    if kind is Implementation.torchao_8bit and find_spec("torchao") is None:
        raise Refused(
            "8-bit moments are torchao's, which is not installed. Type `pip install torchao`, or "
            "optimizer.implementation=fused."
        )
    for name in ("zero_stage", "offload", "deepspeed"):
        if (value := getattr(parallel, name)) and not parallel.uses_deepspeed:
            raise Refused(
                f"parallel.{name}={value} is an option of DeepSpeed only. Type parallel=zero1, parallel=zero2 "
                f"or parallel=zero3 with it, or leave it out."
            )


def _check_fp16(config: Config) -> None:
    """A gradient that overflowed would decide for good what trains, and a loss scale would shrink penalties."""
    method = config.method
    if config.precision.compute is not Compute.fp16 or not isinstance(method, Sparse):
        return
    early = method.selector in (Selector.gradient, Selector.squared_gradient)
    grows = method.schedule is Reselection.regrow and method.growth is Growth.gradient
    if early or grows or method.l1 or method.nuclear:
        raise Refused(
            f"method={method.name} looks at gradients or adds a penalty to them, which precision=fp16 scales. Type "
            "precision=bf16."
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


def rates_by_pattern(lr_scale: list[str]) -> dict[str, float]:
    """What optimizer.lr_scale says, in its order. `Refused` for what is no pattern:factor."""
    found = {}
    for given in lr_scale:
        pattern, _, factor = given.rpartition(":")
        try:
            re.compile(pattern)
            found[pattern] = float(factor)
            flaw = "" if pattern and isfinite(found[pattern]) and found[pattern] >= 0 else "it has no factor from 0 on"
        except (re.error, ValueError) as error:
            flaw = str(error)
        if flaw:
            raise Refused(
                f"optimizer.lr_scale={given} is no pattern:factor ({flaw}). Type one such as "
                "'optimizer.lr_scale=[\"lm_head:0.1\"]'."
            )
    return found


def window_of(text: str) -> tuple[int, int]:
    """`10:15` as the first step and the last; (0, 0) for nothing. `Refused` otherwise."""
    if not text:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise Refused(f"train.profile={text} is no FIRST:LAST of steps. Type one such as train.profile=10:15.")
    return first, last


def _check_heads(model: TinyLlama) -> None:
    if model.hidden_size % (2 * model.num_heads):
        fitting = 2 * model.num_heads * max(1, model.hidden_size // (2 * model.num_heads))
        raise Refused(
            f"model.hidden_size={model.hidden_size} does not split into model.num_heads={model.num_heads} heads of an "
            f"even size. Type model.hidden_size={fitting}."
        )
    if model.num_heads % model.num_kv_heads:
        raise Refused(
            f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}. "
            f"Type model.num_kv_heads={model.num_heads} or another divisor."
        )
