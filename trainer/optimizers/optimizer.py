"""The contract of an optimizer. A kind of optimizer is one file here, and one YAML in conf/optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from trainer.options.config import Config
from trainer.plan import Topology


class OptimizerKind(Protocol):
    """An optimizer as the plan, the resume check and the engines see it."""

    def __init__(self, config: Config) -> None: ...

    def refuse(self, model: nn.Module, topology: Topology) -> None:
        """`Refused` where a model, which is on meta, does not suit under these degrees."""

    def bytes_of(self, shape: torch.Size) -> float:
        """The bytes of state that a parameter of this whole shape needs."""

    def make(
        self, groups: list[dict[str, Any]], shapes: Mapping[nn.Parameter, tuple[int, ...]]
    ) -> torch.optim.Optimizer:
        """The optimizer of these param groups; `shapes` has each parameter's before it was cut.

        One that is not torch's has a method `prepare`, which creates its state, so that a generation can be loaded
        before the first step. Parameters may be DTensors, or flat partitions of several.
        """

    def goes_on_from(self, other: str) -> bool:
        """Whether the state that another optimizer saved is this one's too.

        `other` is its choice (`optimizer=NAME`), or of AdamW the implementation (fused, foreach, torchao_8bit).
        """

    def about(self, model: nn.Module) -> str:
        """A few words for the plan."""
