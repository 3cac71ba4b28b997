"""LoRA by peft: `y = W x + (alpha / r) B A x`, A random, B zero, W frozen (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any, Literal

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from checkpointing.errors import reason_of
from trainer.elastic.randomness import reseed
from trainer.errors import Refused
from trainer.methods.deltas import Delta
from trainer.methods.method import Method, Sizes, Stored
from trainer.methods.targets import ALL, check_targets, check_untied
from trainer.options.config import Config
from trainer.options.method import Lora


def _follows() -> dict[str, Literal["rows", "columns", "whole"]]:
    """How tensor parallelism cuts an adapter: A has the layer's inputs, B its outputs."""
    return {"lora_A": "columns", "lora_B": "rows"}


class LoraMethod(Method):
    """Freeze the model and add adapters to the targeted modules."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, Lora)
        self._options, self._seed = config.method, config.train.seed

    def attach(self, model: nn.Module, sizes: Sizes | None = None) -> nn.Module:
        options, targets = self._options, self._options.target_modules
        check_targets(model, targets)
        check_untied(model, targets)
        reseed(self._seed, "method")
        try:
            adapted: nn.Module = get_peft_model(
                model,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=options.r,
                    lora_alpha=options.alpha,  # peft annotates an int, and divides it by r
                    lora_dropout=options.dropout,
                    target_modules=ALL if targets == [ALL] else targets,  # peft reads any other string as a pattern
                ),
            )
        except ValueError as error:
            why = reason_of(error)
            raise Refused(f"method.target_modules={targets} does not fit the model: {why}") from None
        for module in adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.follows = _follows
        return adapted

    def adds(self, name: str) -> bool:
        return any(part.startswith("lora_") for part in name.split("."))

    def delta(self, run: Stored, base: nn.Module | None) -> Delta:
        raise Refused("The difference of a LoRA is its adapter, not entries. `merge` writes the merged model.")

    def merged(self, run: Stored) -> nn.Module:
        adapted: Any = self.adapter(run)
        merged: nn.Module = adapted.merge_and_unload()
        return merged

    def adapter(self, run: Stored) -> nn.Module:
        return run.attached()
