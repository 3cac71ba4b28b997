"""Engines of DeepSpeed on a model with tied, frozen, odd and tiny parameters, for tests of what they hold and save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from checkpointing import Piece
from trainer.parallel.deepspeed_engine import initialize, make_ready
from trainer.parallel.world import World

ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
ROWS = 6  # of a batch: 1, 2 and 3 ranks share them equally
# Stage, offload, and in how many bits DeepSpeed computes.
ENGINES = [(0, False, 32), (1, False, 32), (2, False, 32), (3, False, 32), (2, True, 32), (3, True, 32)]
LOW = [(0, False, 16), (1, False, 16), (2, False, 16), (3, False, 16)]
Kind = tuple[int, bool, int]


class Model(nn.Module):
    """Tied, frozen, odd and tiny parameters, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.frozen = nn.Linear(7, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.training:
            self.seen += tokens.numel()
        return self.head(x + self.frozen(self.norm(functional.gelu(self.inner(x))) * self.gain))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    """Two learning rates, and no decay on what is not a matrix."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.dim() >= 2], "lr": 3e-2, "weight_decay": 0.1}
    others = {"params": [p for p in trained if p.dim() < 2], "lr": 1e-2, "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, others], **ADAMW)


def start(kind: Kind, model: nn.Module | None = None) -> Any:
    """An engine on this process's world; small parameters persist in stage 3, and large ones do not."""
    stage, offload, bits = kind
    model = model or Model()
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 20, "reduce_bucket_size": 1000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": bits == 16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    torch_linear = functional.linear
    world = World(dist.get_rank(), dist.get_world_size(), local_rank=dist.get_rank())
    try:
        make_ready(world, torch.device("cpu"))
        return initialize(model, optimizer_of(model), config)
    finally:
        functional.linear = torch_linear  # which stage 3 replaces in the whole process


def tokens_of(step: int) -> torch.Tensor:
    return torch.randint(0, 11, (ROWS, 5), generator=torch.Generator().manual_seed(step))


def loss_of(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(rows).float().flatten(0, 1), rows.roll(1, 1).flatten(), reduction="sum")


def train_engine(engine: Any, steps: Sequence[int]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in steps:
        engine.backward(loss_of(engine, tokens_of(step)[rank::size]) * size / ROWS)
        engine.step()


def train_alone(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
    for step in steps:
        (loss_of(model, tokens_of(step)) / ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
    """The logical tensors, put together from the pieces of all ranks; what nobody holds stays at a sentinel."""
    parts: list[Any] = [None] * dist.get_world_size() if dist.is_initialized() else [None]
    mine = [(p.name, p.box.slices((0,) * len(p.offset)), p.global_shape, p.tensor.detach().clone()) for p in pieces]
    if dist.is_initialized():
        dist.all_gather_object(parts, mine)
    else:
        parts = [mine]
    found: dict[str, torch.Tensor] = {}
    for name, box, shape, part in (piece for rank in parts for piece in rank):
        found.setdefault(name, torch.full(shape, -77, dtype=part.dtype))[box] = part
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
