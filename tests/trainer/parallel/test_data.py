"""How a model is sharded or replicated over the ranks that share the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tests.harness.engines import CPU, MODEL
from tests.harness.worlds import SharedWorld
from trainer.compose import compose
from trainer.methods import build
from trainer.models import blocks
from trainer.parallel.data import distribute
from trainer.parallel.mesh import Mesh
from trainer.plan import Topology


def kinds(replicate: int, shard: int) -> tuple[str, int, int]:
    """The kind of what is called, the blocks that are sharded alone, and the elements that this rank holds."""
    topology = Topology(dp_replicate=replicate, dp_shard=shard)
    mesh = Mesh.of(topology, dist.get_rank() if dist.is_initialized() else 0, CPU)
    model = build(compose(MODEL))
    called = distribute(model, mesh, CPU)
    name = (
        "DDP" if isinstance(called, DistributedDataParallel) else "FSDP" if isinstance(called, FSDPModule) else "bare"
    )
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    return name, sum(isinstance(block, FSDPModule) for block in blocks(model)), held


def test_every_kind_of_data_axis(world: SharedWorld) -> None:
    name, sharded, whole = kinds(1, 1)
    assert (name, sharded) == ("bare", 0)
    assert world.run(kinds, 2, 2, 1) == [("DDP", 0, whole)] * 2
    parts = world.run(kinds, 4, 2, 2)
    assert [part[:2] for part in parts] == [("FSDP", 5)] * 4
    assert parts[0] == parts[2] and sum(held for *_, held in parts[:2]) == whole
    assert torch.tensor([held for *_, held in parts]).max() < whole
