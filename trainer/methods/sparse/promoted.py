"""A linear layer with a low-rank pair beside its frozen weight: what many hits in one weight become (SPT)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from checkpointing import Held


class PromotedLayer(nn.Module):
    """`y = W x + b + B A x`, B zero at first."""

    lora_A: nn.Linear
    lora_B: nn.Linear

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        base: torch.Tensor = super().forward(inputs)  # of the layer that it became of
        added: torch.Tensor = self.lora_B(self.lora_A(inputs))
        return base + added

    def product(self, inputs: torch.Tensor) -> torch.Tensor:
        """The output without the bias."""
        weight: Any = self.weight
        base = functional.linear(inputs, weight.t() if isinstance(self, Conv1D) else weight)
        added: torch.Tensor = self.lora_B(self.lora_A(inputs))
        return base + added

    def take_share(self, share: Held) -> None:
        """Nothing is derived from the weight."""

    def follows(self) -> dict[str, Literal["rows", "columns", "whole"]]:
        """A has the layer's inputs, B its outputs."""
        return {"lora_A": "columns", "lora_B": "rows"}


class PromotedLinear(PromotedLayer, nn.Linear):
    pass


class PromotedConv1D(PromotedLayer, Conv1D):  # type: ignore[misc]  # transformers is not typed
    pass


def make_promoted(layer: nn.Module, rank: int) -> None:
    """Give a layer its pair, in place. A is drawn from torch's generator as it stands."""
    made: Any = layer
    weight: torch.Tensor = made.weight
    inputs, outputs = weight.shape if isinstance(layer, Conv1D) else weight.shape[::-1]
    made.__class__ = PromotedConv1D if isinstance(layer, Conv1D) else PromotedLinear
    made.lora_A = nn.Linear(inputs, rank, bias=False, device=weight.device)
    made.lora_B = nn.Linear(rank, outputs, bias=False, device=weight.device)
    nn.init.zeros_(made.lora_B.weight)
