"""How the gradients of ranks that compute different samples become one.

A reducer is made anew with every engine, and installed on a model as it is called for training. One of a new kind is a
file of its own: `parallel.reducer` names it (docs/adding.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Protocol

import torch
from torch import nn

from trainer.options.parallel import REDUCERS, Parallel
from trainer.parallel.mesh import Mesh


class Reducer(Protocol):
    """Every method but `attach` is collective, over the ranks of the mesh's data axes at least."""

    def attach(self, called: nn.Module) -> None:
        """Install on a model as it is called: DDP's, FSDP2's, or a bare one. A pipeline has one a stage."""

    def finish(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Make the gradients of a step, by parameter, their mean over the data-parallel ranks, in place.

        Called after the last backward. A gradient is a DTensor where its parameter is sharded.
        """

    def sum(self, values: torch.Tensor, *axes: str) -> torch.Tensor:
        """The sum of a few values, such as losses or squared norms, over the ranks along these axes, in place."""


class PlainReducer:
    """DDP and FSDP2 reduce gradients themselves, in the order that the communication library takes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def attach(self, called: nn.Module) -> None:
        """Leave the model's own reduction as it is."""

    def finish(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Nothing is left to do: they were reduced in the backward."""

    def sum(self, values: torch.Tensor, *axes: str) -> torch.Tensor:
        return self._mesh.sum(values, *axes)


def make_reducer(options: Parallel, mesh: Mesh) -> Reducer:
    """The reducer that `parallel.reducer` names, for one engine."""
    module, _, name = REDUCERS[options.reducer].partition(":")
    made: Reducer = getattr(import_module(module), name)(mesh)
    return made
