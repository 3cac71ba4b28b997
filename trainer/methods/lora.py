"""LoRA by peft: `y = W x + (alpha / r) B A x`, A random, B zero, W frozen (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch import nn

from trainer.config import Lora
from trainer.elastic.randomness import reseed
from trainer.errors import Refused


def apply(model: nn.Module, config: Lora, seed: int) -> nn.Module:
    """Freeze the model and add adapters to the targeted modules; at the start the output does not change."""
    targets = [name.strip() for name in config.target_modules.split(",")]
    reseed(seed, "method")
    try:
        adapted: nn.Module = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.r,
                lora_alpha=config.alpha,  # peft annotates an int, and divides it by r
                lora_dropout=config.dropout,
                target_modules=targets[0] if len(targets) == 1 else targets,
            ),
        )
    except ValueError as error:
        raise Refused(f"method.target_modules={config.target_modules} does not fit the model: {error}") from None
    return adapted
