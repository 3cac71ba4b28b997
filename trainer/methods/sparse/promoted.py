"""A linear layer with a low-rank pair beside its frozen weight: what many hits in one weight become (SPT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class PromotedLayer(nn.Module):
    """`y = W x + b + B A x`, B zero at first. Named as peft's adapters are, so that it is cut as they are."""

    lora_A: nn.Linear
    lora_B: nn.Linear

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        base: torch.Tensor = super().forward(inputs)  # of the layer that it became of
        added: torch.Tensor = self.lora_B(self.lora_A(inputs))
        return base + added


class PromotedLinear(PromotedLayer, nn.Linear):
    pass


class PromotedConv1D(PromotedLayer, Conv1D):  # type: ignore[misc]  # transformers is not typed
    pass


def make_promoted(layer: nn.Module, rank: int) -> None:
    """In place; A is drawn from torch's generator as it stands."""
    made: Any = layer
    weight: torch.Tensor = made.weight
    inputs, outputs = weight.shape if isinstance(layer, Conv1D) else weight.shape[::-1]
    made.__class__ = PromotedConv1D if isinstance(layer, Conv1D) else PromotedLinear
    made.lora_A = nn.Linear(inputs, rank, bias=False, device=weight.device)
    made.lora_B = nn.Linear(rank, outputs, bias=False, device=weight.device)
    nn.init.zeros_(made.lora_B.weight)
