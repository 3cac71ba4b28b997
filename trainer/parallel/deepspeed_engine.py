"""The engine of DeepSpeed: ZeRO stages 0 to 3, optimizer state on the CPU where that is asked for.

DeepSpeed only shards, reduces and steps. What is computed, clipped and drawn is the same as in every other engine.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from checkpointing import Piece, Slice, describe_zero, held_in_partition, parameter_names, publish_zero
from trainer.data.dataset import Batch
from trainer.models import blocks
from trainer.options.config import Config
from trainer.parallel.computing import (
    LOW,
    Draws,
    MakeOptimizer,
    computed_in,
    logits_of,
    parts_of,
    set_lr,
    summed_loss,
)
from trainer.parallel.deepspeed_options import engine_options
from trainer.parallel.torch_engine import checkpoint_blocks
from trainer.parallel.world import World
from trainer.plan import Topology


class DeepSpeedEngine:
    """Every process is a share of the data."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        topology: Topology,
        world: World,
        device: torch.device,
        make_optimizer: MakeOptimizer,
        initialize_by: Callable[[nn.Module, torch.optim.Optimizer, dict[str, Any]], Any] | None = None,
    ) -> None:
        self.device, self.world_size = device, world.size
        self.data_rank, self.data_size = world.rank, topology.data_size
        self._local_batch = config.parallel.local_batch
        self._clip = config.optimizer.clip
        self._bare = model
        if config.parallel.activation_checkpointing:
            checkpoint_blocks(model)
        self._draws = Draws(model, {layer: number for number, layer in enumerate(blocks(model))})
        if (low := LOW.get(config.precision.compute)) is not None:
            # DeepSpeed's own bf16 would keep a second copy of the weights, and norms and the residual stream would be
            # bf16 too: a run would compute something else than in the other layouts. Its autocast would reduce
            # gradients in bf16, and it switches one around it off; so autocast is inside of what it calls.
            model.forward = computed_in(low, device)(model.forward)
        ours = functional.linear
        make_ready(world, device)
        optimizer = make_optimizer(model, {})
        options = engine_options(config, sum(p.numel() for p in model.parameters() if p.requires_grad))
        self._engine = (initialize_by or initialize)(model, optimizer, options)
        # Stage 3 replaces torch's linear in the whole process by one that does not keep gathered weights for the
        # backward; here it is in place only while this engine computes.
        self._linear, functional.linear = functional.linear, ours

    def accumulate(self, micro_batches: Sequence[tuple[int, Batch]], weight: float) -> torch.Tensor:
        total = torch.zeros(1, device=self.device, dtype=torch.float64)
        parts = list(parts_of(micro_batches, self._local_batch, self.device))
        with self._computing():
            for turn, part in enumerate(parts, start=1):
                self._engine.set_gradient_accumulation_boundary(turn == len(parts))
                self._draws.start(part)
                batch = part.batch
                loss = summed_loss(logits_of(self._engine, batch.inputs, batch.positions, low=None), batch.labels)
                self._engine.backward(loss * weight)
                total += loss.detach()
        return total

    def step(
        self, lr: float, loss_scale: float | None = None, before_update: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        optimizer = self._engine.optimizer
        before_update()
        set_lr(optimizer.param_groups, lr)
        # DeepSpeed takes the mean over ranks (and over as many turns as it was told: one).
        factor = self.data_size / (loss_scale or 1.0)
        if self._engine.zero_optimization_stage() == 0:  # DeepSpeed would clip, and keep the norm to itself
            norm = self._clip_whole(factor, left_out=loss_scale is not None)
            self._engine.step()
            return norm
        # It divides by a scale that it is given, and leaves out a step that overflows. Only here: its backward would
        # multiply the loss by it.
        optimizer.custom_loss_scaler, optimizer.external_loss_scale = True, 1 / factor
        self._engine.step()
        optimizer.custom_loss_scaler = False
        return torch.as_tensor(self._engine.get_global_grad_norm()).to(self.device, torch.float32)

    def _clip_whole(self, factor: float, *, left_out: bool) -> torch.Tensor:
        """Multiply and clip the whole gradients of stage 0; the norm in between.

        None are left of a step that overflowed where such steps are left out.
        """
        parameters = [p for p in self._bare.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
        norm = nn.utils.clip_grad_norm_(parameters, self._clip or math.inf)
        if left_out and not norm.isfinite():
            for parameter in parameters:
                parameter.grad = None
        return norm.to(self.device, torch.float32)

    def loss(self, batches: Sequence[Batch]) -> torch.Tensor:
        total = torch.zeros(1, device=self.device, dtype=torch.float64)
        with self._evaluating() as model:
            for part in parts_of([(0, batch) for batch in batches], self._local_batch, self.device):
                batch = part.batch
                total += summed_loss(logits_of(model, batch.inputs, batch.positions, low=None), batch.labels)
        return total

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        with self._evaluating() as model:
            return logits_of(model, tokens, low=None)[:, -1]

    def pieces(self) -> list[Piece]:
        return describe_zero(self._engine)

    @property
    def layer_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.data_size > 1 else None

    def parameter_names(self) -> Collection[str]:
        return parameter_names(self._bare).keys()

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        return None

    @property
    def tensor_rank(self) -> int:
        return 0

    def whole(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters), enabled=self._shards_parameters):
            return [p.detach().clone() if self._shards_parameters else p.detach() for p in parameters]

    def written(self, parameters: Sequence[nn.Parameter]) -> None:
        """Stage 3 keeps small parameters gathered, beside their shards."""
        if self._shards_parameters:
            for parameter in parameters:
                gathered: Any = parameter
                if gathered.ds_status is type(gathered.ds_status).AVAILABLE:
                    gathered.partition()

    def close(self) -> None:
        """DeepSpeed's hooks and parameters hold one another, partly where Python's collector does not look."""
        with self._computing():
            self._engine.destroy()
        for holder in (*self._bare.parameters(), self._engine.optimizer, self._engine):
            vars(holder).clear()

    @property
    def _shards_parameters(self) -> bool:
        return bool(self._engine.zero_optimization_stage() == 3)

    def held_of(self, tensor: torch.Tensor) -> list[Slice]:
        if self._engine.zero_optimization_stage() == 0:  # nothing is taken apart
            return [Slice(tensor, 0, tensor.numel(), 0)]
        return held_in_partition(self._engine, tensor)

    def publish(self) -> None:
        publish_zero(self._engine)

    @contextmanager
    def _evaluating(self) -> Iterator[nn.Module]:
        """The model to call; stage 3 gathers by hooks of its modules."""
        self._bare.eval()
        with torch.no_grad(), self._computing():
            yield self._bare
        self._bare.train()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        ours, functional.linear = functional.linear, self._linear
        try:
            yield
        finally:
            functional.linear = ours


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> Any:
    """DeepSpeed's own engine, in the process group that is there."""
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]


def make_ready(world: World, device: torch.device) -> None:
    """Import DeepSpeed so that it takes this device, compiles nothing, and writes to stderr, and only what matters."""
    os.environ["DS_ACCELERATOR"] = device.type  # it would look for one itself, and say so
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # one process alone has none
    import deepspeed.ops

    # It calls torch's collectives by names that torch wants to drop: nothing that a user could change.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_can_be_acted_upon)
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    # On CPUs it would compile an all-reduce at the first use, for over a minute, whose shared memory nobody removes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    forget_earlier_engines()


def _can_be_acted_upon(record: logging.LogRecord) -> bool:
    """Optimizers that DeepSpeed does not know are tested here under each of its stages."""
    return "untested optimizer" not in record.getMessage()


def forget_earlier_engines() -> None:
    """DeepSpeed keeps the groups of a process group that is gone, and numbers modules through the life of a process.

    Ranks compare those numbers in stage 3, and would fail where one had another engine before.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    groups._release_process_group_references()
    (count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0] = Init.param_id = 0
