"""The engine of plain torch: one process, DDP, FSDP2, or FSDP2 with replicas (HSDP)."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from checkpointing import Piece, describe
from trainer.config import Compute, Config
from trainer.config import Optimizer as OptimizerConfig
from trainer.data.dataset import IGNORE, Batch
from trainer.elastic.randomness import reseed
from trainer.parallel.world import World
from trainer.plan import Topology


class TorchEngine:
    """Parameters stay fp32 masters in every layout, and bf16 is autocast in every layout, so that a run computes the
    same wherever it goes on."""

    def __init__(
        self, config: Config, model: nn.Module, topology: Topology, world: World, device: torch.device
    ) -> None:
        self.device = device
        self.data_rank, self.data_size = world.rank, world.size
        self._local_batch = config.parallel.local_batch
        self._clip = config.optimizer.clip
        self._bf16 = config.precision.compute is Compute.bf16
        self._bare = model
        self._model = _distribute(self._bare, topology, device)
        self._optimizer = make_optimizer(self._bare, config.optimizer)

    def forward_backward(self, batch: Batch, weight: float, *, last: bool, key: int) -> torch.Tensor:
        batch = batch.to(self.device)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        parts = list(batch.split(self._local_batch))
        for number, part in enumerate(parts):
            reseed(key, number)
            with self._synchronise(last and number == len(parts) - 1):
                loss = self._summed_loss(self._model, part)
                # DDP and FSDP2 take the mean over ranks: this makes it the sum.
                (loss * (weight * self.data_size)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def step(self, lr: float) -> torch.Tensor:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def loss(self, batch: Batch) -> torch.Tensor:
        model = self.module().eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        with torch.no_grad():
            for part in batch.to(self.device).split(self._local_batch):
                total += self._summed_loss(model, part)
        model.train()
        return total

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        if self.data_size > 1:
            dist.all_reduce(values)
        return values

    def module(self) -> nn.Module:
        # Without gradients DDP has nothing to add; FSDP2 lives inside the module itself.
        return self._bare

    def pieces(self) -> list[Piece]:
        return describe(self._bare, self._optimizer)

    def publish(self) -> None:
        """Nothing here is derived from the pieces: masters are what computes."""

    def _summed_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits = model(input_ids=batch.inputs, use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def _synchronise(self, now: bool) -> AbstractContextManager[object]:
        """DDP reduces gradients once a step. FSDP2 reduces them each time, so that only shards of them are kept."""
        if isinstance(self._model, DistributedDataParallel) and not now:
            return self._model.no_sync()
        return nullcontext()


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what trains; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def _distribute(model: nn.Module, topology: Topology, device: torch.device) -> nn.Module:
    """The model as it is called for training under this topology, on its device."""
    if topology.dp_shard > 1:
        mesh = init_device_mesh(
            device.type, (topology.dp_replicate, topology.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
        )
        mesh = mesh if topology.dp_replicate > 1 else mesh["dp_shard"]
        # Each block moves to the device as it is sharded, so that the device never holds the whole model.
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        # The root is the model inside peft's wrapper: generating calls that one, past the wrapper's forward.
        root = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
        assert len(list(root.parameters())) == len(list(model.parameters())), "a wrapper has parameters of its own"
        fully_shard(root, mesh=mesh)
        return model
    model = model.to(device)
    if topology.dp_replicate > 1:
        # Buffers of causal language models are constants. torch 2.13 renamed the option that leaves them alone.
        option = "broadcast_buffers"
        if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
            option = "forward_sync_buffers"
        leave_buffers: dict[str, Any] = {option: False}
        device_ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **leave_buffers)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model, by the class names that transformers lists as indivisible."""
    names = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    return [m for m in model.modules() if type(m).__name__ in names and not isinstance(m, FSDPModule)]
