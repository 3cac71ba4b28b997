"""LoRA by peft: `y = W x + (alpha / r) B A x`, A random, B zero, W frozen (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch import nn

from checkpointing.errors import reason_of
from trainer.choices import Lora
from trainer.elastic.randomness import reseed
from trainer.errors import Refused
from trainer.methods.targets import ALL, check_targets, check_untied


def apply(model: nn.Module, config: Lora, seed: int) -> nn.Module:
    """Freeze the model and add adapters to the targeted modules; at the start the output does not change."""
    targets = config.target_modules
    check_targets(model, targets)
    check_untied(model, targets)
    reseed(seed, "method")
    try:
        adapted: nn.Module = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.r,
                lora_alpha=config.alpha,  # peft annotates an int, and divides it by r
                lora_dropout=config.dropout,
                target_modules=ALL if targets == [ALL] else targets,  # peft reads any other string as a pattern
            ),
        )
    except ValueError as error:
        why = reason_of(error)
        raise Refused(f"method.target_modules={targets} does not fit the model: {why}") from None
    return adapted
