"""Fine-tuning methods: what of a model trains, and what is added to it. One file a mechanism."""

from __future__ import annotations

from torch import nn

from trainer.config import Lora, Method


def apply_method(model: nn.Module, config: Method, *, seed: int) -> nn.Module:
    """The model as it will train: parameters frozen or added. What is added follows from the seed alone."""
    if isinstance(config, Lora):
        from trainer.methods import lora  # peft takes a second to import, and the other methods do without it

        return lora.apply(model, config, seed)
    return model
