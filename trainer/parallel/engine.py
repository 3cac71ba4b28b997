"""What the loop needs of an engine; everything about layouts stays behind this protocol."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from checkpointing import Piece
from trainer.config import Config, Engine
from trainer.data.dataset import Batch
from trainer.parallel.world import World
from trainer.plan import Topology


class TrainingEngine(Protocol):
    """One model and its optimizer, on all ranks. Every method is collective: all ranks call it, in the same order."""

    device: torch.device
    data_rank: int  # which share of the global batch this rank computes, of `data_size` shares
    data_size: int

    def forward_backward(self, batch: Batch, weight: float, *, last: bool, key: int) -> torch.Tensor:
        """Add `weight` times the gradient of the summed loss of one logical micro-batch; return that sum, detached.

        `last` marks the rank's last micro-batch of the step; `key` starts its random draws.
        """

    def step(self, lr: float) -> torch.Tensor:
        """Sum gradients over ranks, clip, update, clear; return the norm before clipping (0-dimensional)."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a batch in evaluation mode, on this rank."""

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over the shares of the global batch, in place."""

    def module(self) -> nn.Module:
        """The model to call in evaluation; all ranks must call it together."""

    def pieces(self) -> list[Piece]:
        """Everything that training changes or depends on, for the checkpoint."""

    def publish(self) -> None:
        """After a load: rebuild whatever is derived from the pieces."""


def make_engine(
    config: Config, model: nn.Module, topology: Topology, world: World, device: torch.device
) -> TrainingEngine:
    assert config.parallel.engine is Engine.torch
    from trainer.parallel.torch_engine import TorchEngine

    return TorchEngine(config, model, topology, world, device)
