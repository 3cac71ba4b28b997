"""The contract of an engine: one model and its optimizer on all ranks. Everything about layouts stays behind it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from checkpointing import Piece, Slice
from trainer.data.dataset import Batch
from trainer.options.config import Config
from trainer.options.parallel import Engine
from trainer.parallel.computing import MakeOptimizer
from trainer.parallel.deepspeed_options import check_deepspeed
from trainer.parallel.world import World
from trainer.plan import Topology, resolve_topology


class TrainingEngine(Protocol):
    """One model and its optimizer, on all ranks. Every method is collective: all ranks call it, in the same order."""

    device: torch.device
    world_size: int  # processes of the run
    data_rank: int  # which share of the global batch this rank computes, of `data_size` shares
    data_size: int

    @property
    def layer_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold parts or copies of the layers that this one holds; None for this rank alone."""

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group: the ranks of `layer_group` that compute the same samples. None without one."""

    @property
    def tensor_rank(self) -> int:
        """This rank's place in the tensor group."""

    def accumulate(self, micro_batches: Sequence[tuple[int, Batch]], weight: float) -> torch.Tensor:
        """Add `weight` times the gradient of the summed loss of this rank's logical micro-batches of one step.

        Each comes with the key that starts its random draws. Returns the summed loss, detached (float64, one element);
        zero on ranks that do not compute it, so that `reduce` gives that of all.
        """

    def step(
        self, lr: float, loss_scale: float | None = None, before_update: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """Sum gradients over ranks, clip, update, clear; return the norm before clipping (0-dimensional).

        With a loss scale gradients are divided by it, and where their norm is not finite then, nothing is updated.
        `before_update` is called before anything writes to the pieces, but for volatile ones.
        """

    def loss(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The summed loss of batches in evaluation mode, as `accumulate` returns it."""

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over the ranks that compute a share of it, in place."""

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the token that follows `tokens` (of shape [samples, positions]), in evaluation, on all ranks."""

    def pieces(self) -> Sequence[Piece]:
        """Everything that the engine keeps of the model and the optimizer."""

    def parameter_names(self) -> Collection[str]:
        """The logical names of the parameters of the layers that this rank computes, whatever it holds of them."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Gather trained parameters that may be sharded over the data: each whole on every rank that has it."""

    def written(self, parameters: Sequence[nn.Parameter]) -> None:
        """Invalidate gathered copies of these frozen parameters: their shards were changed in place."""

    def held_of(self, tensor: torch.Tensor) -> list[Slice]:
        """Which entries of which parameters a tensor of the optimizer's param groups holds."""

    def publish(self) -> None:
        """Rebuild what is derived from the pieces, after they were loaded."""

    def close(self) -> None:
        """Let go of the model, so that its memory is free when this object is. Nothing else is called after it."""


def as_launched(config: Config) -> Config:
    """Take over the layout that the launcher was configured for, where that is accelerate's to say."""
    if config.parallel.engine is Engine.accelerate:
        from trainer.parallel.accelerate_engine import as_configured

        return as_configured(config)
    return config


def find_topology(config: Config, world: World, device: torch.device) -> Topology:
    """The degrees that the chosen engine computes with. `Refused` if they do not fit these processes."""
    if config.parallel.engine is Engine.accelerate:
        from trainer.parallel.accelerate_engine import topology_of

        return topology_of(config, world, device)
    topology = resolve_topology(config.parallel, world.size)
    if config.parallel.engine is Engine.deepspeed:
        check_deepspeed(config, topology)
    return topology


def make_engine(
    config: Config,
    model: nn.Module,
    topology: Topology,
    world: World,
    device: torch.device,
    make_optimizer: MakeOptimizer,
) -> TrainingEngine:
    """The engine of a model that is whole on every rank."""
    if config.parallel.engine is Engine.accelerate:
        from trainer.parallel.accelerate_engine import make_accelerate_engine

        return make_accelerate_engine(config, model, topology, world, device, make_optimizer)
    if config.parallel.engine is Engine.deepspeed:
        from trainer.parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, model, topology, world, device, make_optimizer)
    from trainer.parallel.torch_engine import TorchEngine

    return TorchEngine(config, model, topology, world, device, make_optimizer)
