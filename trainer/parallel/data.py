"""The data axes: a model, or a stage of one, sharded (FSDP2) or replicated (DDP) over ranks that share the batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainer.models import blocks
from trainer.parallel.mesh import Mesh
from trainer.parallel.pipeline import Stage, inside


def distribute(model: nn.Module, mesh: Mesh, device: torch.device) -> nn.Module:
    """The model as it is called for training, sharded or replicated over the data, on its device."""
    topology = mesh.topology
    if topology.dp_shard > 1:
        assert mesh.whole is not None
        data = mesh.whole["dp_replicate", "dp_shard"] if topology.dp_replicate > 1 else mesh.whole["dp_shard"]
        # Each block moves to the device as it is sharded, so that the device never holds the whole model.
        for block in blocks(model):
            fully_shard(block, mesh=data)
        # The root is the model inside peft's wrapper, past which evaluation calls it; a stage is one by itself.
        root = model if isinstance(model, Stage) else inside(model)
        assert len(list(root.parameters())) == len(list(model.parameters())), "a wrapper has parameters of its own"
        fully_shard(root, mesh=data)
        return model
    model = model.to(device)
    if topology.dp_replicate > 1:
        # Buffers of causal language models are constants. torch 2.13 renamed the option that leaves them alone.
        option = "broadcast_buffers"
        if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
            option = "forward_sync_buffers"
        leave_buffers: dict[str, Any] = {option: False}
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=mesh.group("dp_replicate"),
            gradient_as_bucket_view=True,
            **leave_buffers,
        )
    return model
