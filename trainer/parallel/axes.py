"""The axes along which ranks take a model apart: what each refuses, and what it does at the end of a step.

An axis is a file: `tensor.py` and `pipeline.py` take the model apart, in this order, and `data.py` replicates or shards
what is left. Their degrees are the fields of `Topology`, and `trainer.plan.AXES` has the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from checkpointing import Piece
from trainer.errors import Refused
from trainer.options.config import Config
from trainer.parallel import pipeline, tensor
from trainer.plan import Topology


@dataclass(frozen=True)
class Axis:
    """An axis that not every model can be taken apart along: the name of its degree, and what refuses one."""

    name: str
    refuse: Callable[[nn.Module, int, Config], None]  # for a model on meta; not collective


TAKING = (
    Axis("tp", lambda model, degree, config: tensor.check_splittable(model, degree)),
    Axis("pp", lambda model, degree, config: pipeline.check_stages(model, degree, config.parallel.pp_schedule)),
)


class TakenApart(Protocol):
    """This rank's part of a model along one axis."""

    def finish(self, gradients: dict[str, torch.Tensor]) -> Collection[str]:
        """Complete the reduced gradients of a step with what other ranks of the axis have of them, in place.

        Returns the names of those that another rank counts in the norm. Collective.
        """

    def described(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces of this rank as a checkpoint knows them, whatever the axis has done to names and ranges."""


def refuse_layout(model: nn.Module, topology: Topology, config: Config) -> None:
    """`Refused` where a model cannot be taken apart by these degrees. Not collective."""
    for axis in TAKING:
        if (degree := getattr(topology, axis.name)) > 1:
            axis.refuse(model, degree, config)


def is_possible(model: nn.Module, topology: Topology, config: Config) -> bool:
    """Whether a model can be taken apart by these degrees."""
    try:
        refuse_layout(model, topology, config)
    except Refused:
        return False
    return True
