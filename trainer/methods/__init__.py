"""Fine-tuning methods: what of a model trains, and what is added to it. method.py is the contract."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from torch import nn

from checkpointing import Team
from trainer.methods.method import Method
from trainer.models import build_model
from trainer.options.config import Config


def method_of(config: Config) -> Method:
    """The chosen method, which is imported only now: peft takes a second, and the other methods do without it."""
    module, _, name = config.method.made_by.partition(":")
    made: Method = getattr(import_module(module), name)(config)
    return made


def build(
    config: Config, device: str = "cpu", sizes: Mapping[str, int] | None = None, team: Team | None = None
) -> nn.Module:
    """The model with its method, its values a function of the seed; on `meta` its shapes, as far as known.

    `sizes` are how much of each layer trains, where a checkpoint tells. With a team, all of whose ranks call this, one
    process of each machine reads the model.
    """
    model = build_model(config.model, seq_len=config.train.seq_len, seed=config.train.seed, device=device, team=team)
    method = method_of(config)
    if device == "meta" and sizes is None:
        sizes = method.expected(model)
    return method.attach(model, sizes)


def build_largest(config: Config) -> nn.Module:
    """The model on `meta`, in the phase of its method that needs most memory."""
    model = build(config, "meta")
    method_of(config).largest(model)
    return model
