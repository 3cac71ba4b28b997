"""Changes of settings since a checkpoint was saved: which leave the result as it was, and which are refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.errors import Refused
from trainer.models import architecture, draws_randomness
from trainer.optimizers import optimizer_of
from trainer.options.config import CHOICES, Config, choice_of, is_free
from trainer.options.data import Stdlib, Text
from trainer.options.method import Full
from trainer.options.stored import as_json, flatten


def check_state(
    config: Config, state: dict[str, Any], fingerprint: str, model: nn.Module
) -> dict[str, tuple[Any, Any]]:
    """Changes since a checkpoint was saved, as (was, is) by option; `Refused` if they alter the result."""
    saved = _filled(state["config"], config)
    changes = _changes(saved, as_json(config))
    refused = {key: f"{key} (was {was}, is {now})" for key, (was, now) in changes.items() if not is_free(config, key)}
    _check_moments(config, saved)
    refused.pop("optimizer.implementation", None)  # the same arithmetic, rounded in another order
    if "train.steps" in refused and config.train.steps > changes["train.steps"][0]:
        del refused["train.steps"]
    if "parallel.local_batch" in changes and config.method.grows_by_parts:
        refused["parallel.local_batch"] = "parallel.local_batch (entries grow by gradients of its first part)"
    if "model.attention" in changes and draws_randomness(model):
        refused["model.attention"] = "model.attention (the model has dropout, which each kernel draws in its own way)"
    if "parallel.local_batch" in changes and draws_randomness(model):  # dropout is drawn a part at a time
        refused["parallel.local_batch"] = "parallel.local_batch (the model has dropout, drawn for each part)"
    even = isinstance(config.data, Stdlib | Text) and not config.data.pack  # all rows are as wide as a pipeline's
    if "parallel.pp" in changes and draws_randomness(model) and not even:
        refused["parallel.pp"] = "parallel.pp (dropout is drawn for the width of a pipeline's micro-batches)"
    if fingerprint != state["fingerprint"] and "data" not in refused:
        refused["data"] = "data (what it holds has changed)"
    different = architecture(model) != state["architecture"]
    if different and not any(key.startswith("model") for key in refused):  # as where model.path holds another one
        refused["model"] = "model (its configuration has changed)"
    allowed = config.resume_allow
    refused = {k: v for k, v in refused.items() if not any(k == a or k.startswith(f"{a}.") for a in allowed)}
    if refused:
        raise Refused(
            "This run was saved with other settings, and going on would not give its result: "
            f"{', '.join(refused.values())}. Put them back, choose another run.name, or type "
            f"resume_allow=[{','.join([*allowed, *refused])}] to go on all the same."
        )
    return changes


def _check_moments(config: Config, saved: dict[str, Any]) -> None:
    """`Refused`, whatever is allowed, where the moments of one optimizer are not those of the other."""
    (choice, was), (_, now) = _optimizer_of(saved), _optimizer_of(as_json(config))
    if was != now and not optimizer_of(config).goes_on_from(was):
        key = "optimizer" if choice != choice_of(config, "optimizer") else "optimizer.implementation"
        whole = isinstance(config.method, Full)
        leave = "checkpointing export RUN --to hf" if whole else "trainer.methods merge RUN"
        raise Refused(
            f"This run was saved with {key}={was}, whose moments cannot be loaded for {now}. "
            f"Type {key}={was}, or begin another run with its model: `python -m {leave} DIR`, "
            "and model=hf model.path=DIR."
        )


def _optimizer_of(saved: dict[str, Any]) -> tuple[str, str]:
    """The choice of optimizer in a configuration, and its name: of AdamW that of the implementation."""
    choice = saved["choices"]["optimizer"]
    return choice, saved["optimizer"]["implementation"] if choice == "adamw" else choice


def _filled(saved: dict[str, Any], config: Config) -> dict[str, Any]:
    """A saved configuration with the defaults of options, and of groups of choices, that a later release added."""
    defaults = as_json(Config(**{group: type(getattr(config, group))() for group in CHOICES}))
    choices = {**{group: next(iter(known)) for group, known in CHOICES.items()}, **saved["choices"]}
    rechosen = {group for group in CHOICES if choices[group] != choice_of(config, group)}
    saved = {**saved, "choices": choices}
    return _fill(saved, {key: value for key, value in defaults.items() if key not in rechosen})


def _fill(part: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    filled = {**default, **part}
    deeper = {k for k, v in part.items() if isinstance(v, dict) and isinstance(default.get(k), dict)}
    return {k: _fill(v, default[k]) if k in deeper else v for k, v in filled.items()}


def _changes(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options that differ, with their old and new values. Of a group with another choice only the choice."""
    old, new = ({key.removeprefix("choices."): v for key, v in flatten(config).items()} for config in (was, now))
    different = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    rechosen = tuple(f"{group}." for group in CHOICES if group in different)
    return {key: (old.get(key), new.get(key)) for key in different if not key.startswith(rechosen)}
