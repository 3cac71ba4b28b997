"""The optimizer and its param groups, the same for every engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.config import Optimizer


def param_groups(model: nn.Module, config: Optimizer) -> list[dict[str, Any]]:
    """What trains; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        param_groups(model, config), lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True
    )
