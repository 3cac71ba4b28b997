"""What the loop needs of an engine; everything about layouts stays behind this protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import nn

from checkpointing import External, Piece
from checkpointing.format import Manifest
from trainer.choices import Lora, Selective, Sparse
from trainer.config import Config, Engine
from trainer.data.dataset import Batch
from trainer.methods import build
from trainer.methods.externals import frozen_of
from trainer.parallel.deepspeed_options import check_deepspeed
from trainer.parallel.world import World
from trainer.plan import Topology, resolve_topology

if TYPE_CHECKING:
    from trainer.parallel.deepspeed_engine import DeepSpeedEngine
    from trainer.parallel.torch_engine import TorchEngine


class TrainingEngine(Protocol):
    """One model and its optimizer, on all ranks. Every method is collective: all ranks call it, in the same order."""

    device: torch.device
    world_size: int  # processes of the run
    data_rank: int  # which share of the global batch this rank computes, of `data_size` shares
    data_size: int
    fence: Callable[[], None]  # called before anything writes to the pieces, but for volatile ones

    @property
    def layer_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold parts or copies of the same layers as this one; None for this one alone."""

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """Of them those that compute the same samples together; None for this one alone."""

    @property
    def tensor_rank(self) -> int:
        """This one's place in the tensor group."""

    def accumulate(self, micro_batches: Sequence[tuple[int, Batch]], weight: float) -> torch.Tensor:
        """Add `weight` times the gradient of the summed loss of this rank's logical micro-batches of one step.

        Each comes with the key that starts its random draws. Returns the summed loss, detached (float64, one element);
        zero on ranks that do not compute it, so that `reduce` gives that of all.
        """

    def step(self, lr: float, loss_scale: float | None = None) -> torch.Tensor:
        """Sum gradients over ranks, clip, update, clear; return the norm before clipping (0-dimensional).

        With a loss scale they are divided by it, and where their norm is not finite then, nothing is updated.
        """

    def loss(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The summed loss of batches in evaluation mode, as `accumulate` returns it."""

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over the ranks that compute a share of it, in place."""

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the token that follows `tokens` (of shape [samples, positions]), in evaluation mode, on all ranks."""

    def pieces(self) -> Sequence[Piece | External]:
        """Everything that training changes or depends on, for the checkpoint."""

    def pieces_for(self, manifest: Manifest) -> Sequence[Piece | External]:
        """The same to load a generation into, with room for what that one holds."""

    def parameter_names(self) -> Collection[str]:
        """Of the layers that this rank computes, whatever it holds of them."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        """Trained parameters that may be sharded over the data, each whole on every rank that has it."""

    def written(self, parameters: Sequence[nn.Parameter]) -> None:
        """Shards of these frozen parameters were changed in place; what was gathered of them before is old."""

    def publish(self) -> None:
        """After a load: rebuild whatever is derived from the pieces."""

    def close(self) -> None:
        """Let go of the model, so that its memory is free when this object is. Nothing else is called after it."""


def as_launched(config: Config) -> Config:
    """With the layout that the launcher was configured for, where that is accelerate's to say."""
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
    sizes: Mapping[str, int] | None = None,
) -> TrainingEngine:
    """The engine of a model that is whole on every rank. `sizes` are what a sparse one was made with, to be loaded."""
    if isinstance(config.method, Sparse):
        from trainer.methods.sparse.tuned import Makes, TunedEngine

        makes = Makes(
            engine=lambda model: make_plain_engine(config, model, topology, world, device),
            model=lambda sizes: build(config, sizes=sizes),
        )
        return TunedEngine(config, model, makes, device, sizes)
    # Before an engine takes its part of the model: hashes are of what is whole.
    frozen = frozen_of(model, config, world.rank, world.size) if isinstance(config.method, Lora | Selective) else []
    engine = make_plain_engine(config, model, topology, world, device)
    engine.frozen = frozen
    return engine


def make_plain_engine(
    config: Config, model: nn.Module, topology: Topology, world: World, device: torch.device
) -> TorchEngine | DeepSpeedEngine:
    if config.parallel.engine is Engine.accelerate:
        from trainer.parallel.accelerate_engine import make_accelerate_engine

        return make_accelerate_engine(config, model, topology, world, device)
    if config.parallel.engine is Engine.deepspeed:
        from trainer.parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, model, topology, world, device)
    from trainer.parallel.torch_engine import TorchEngine

    return TorchEngine(config, model, topology, world, device)
