"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), by torch's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.options.config import Config
from trainer.options.optimizer import Implementation
from trainer.plan import Topology


class AdamWKind:
    """torch.optim.AdamW with two moments in fp32."""

    def __init__(self, config: Config) -> None:
        self._options = config.optimizer

    def refuse(self, model: nn.Module, topology: Topology) -> None:
        """Nothing is refused."""

    def bytes_of(self, shape: torch.Size) -> float:
        return 8.0 * shape.numel()

    def make(
        self, groups: list[dict[str, Any]], shapes: Mapping[nn.Parameter, tuple[int, ...]]
    ) -> torch.optim.Optimizer:
        options = self._options
        kernels: dict[str, Any] = {options.implementation.value: True}
        betas = (options.betas[0], options.betas[1])
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, **kernels)

    def goes_on_from(self, other: str) -> bool:
        """Both of torch's kernels: the same arithmetic, rounded in another order."""
        return other in (Implementation.fused.value, Implementation.foreach.value)

    def about(self, model: nn.Module) -> str:
        kind = self._options.implementation
        return "AdamW" if kind is Implementation.fused else f"AdamW ({kind.value})"
