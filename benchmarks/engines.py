"""A step of our engines against the plain use of the same library, written by hand.

    python -m benchmarks.engines [--json] [--steps N] [--engines NAME ...]

Two processes of one thread train the tiny Llama; both sides have the same model, micro-batches, optimizer and clipping,
and take one step each in turn. The losses of all steps are asserted equal. Then one more step of each is counted
operation by operation for the most memory that its tensors have at a time.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.report import Row, compared, finish, options_of
from tests.harness.engines import feed_for, held_by, held_by_deepspeed, local_of, training_here, windows
from tests.harness.peak import Peak
from tests.harness.worlds import on_ranks
from trainer.compose import compose
from trainer.data.dataset import Batch
from trainer.data.feed import StepShare
from trainer.loop import optimize
from trainer.methods import build

SIZE, WARMUP, WAIT_S = 2, 6, 600
TIME_BAR, MEMORY_BAR = 1.05, 1.03
CONFIG = ["train.global_batch=8", "train.micro_batch=2"]
ENGINES = {
    "DDP": "ddp",
    "FSDP2": "fsdp",
    "TP": "tp",
    "PP": "pp",
    "ZeRO-1": "zero1",
    "ZeRO-2": "zero2",
    "ZeRO-3": "zero3",
}


class ByHand:
    """What one would write without us: gradients of all micro-batches, clipping, AdamW."""

    def __init__(self, model: nn.Module) -> None:
        self.bare: Any = model
        self.model: Any = self.wrap()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.bare.parameters() if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in self.bare.parameters() if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=not any(isinstance(p, DTensor) and p.device_mesh.ndim > 1 for p in self.bare.parameters()),
        )

    def wrap(self) -> nn.Module:
        raise NotImplementedError

    def shares(self) -> int:
        """How many processes the batch is dealt to."""
        return SIZE

    def loss(self, batch: Batch) -> torch.Tensor:
        logits = self.model(input_ids=batch.inputs, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")

    def backward(self, batches: Sequence[Batch], weight: float) -> torch.Tensor:
        total = torch.zeros(())
        for batch in batches:
            loss = self.loss(batch)
            (loss * weight * self.shares()).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.bare.parameters(), 1.0)

    def held(self) -> list[torch.Tensor]:
        """What it keeps between steps."""
        return [local_of(t) for t in (*self.bare.parameters(), *_state(self.optimizer))]

    def step(self, share: StepShare) -> float:
        total = self.backward([batch for _, batch in share.micro_batches], 1 / share.num_targets)
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.shares() > 1:
            dist.all_reduce(total)
        return float(total) / share.num_targets


class DDP(ByHand):
    def wrap(self) -> nn.Module:
        return DistributedDataParallel(self.bare, gradient_as_bucket_view=True)

    def backward(self, batches: Sequence[Batch], weight: float) -> torch.Tensor:
        with self.model.no_sync():
            total = super().backward(batches[:-1], weight)
        return total + super().backward(batches[-1:], weight)


class FSDP2(ByHand):
    def wrap(self) -> nn.Module:
        for layer in self.bare.model.layers:
            fully_shard(layer)
        fully_shard(self.bare)
        return self.bare  # type: ignore[no-any-return]


class TP(ByHand):
    def wrap(self) -> nn.Module:
        plan: dict[str, Any] = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        }
        for n in range(len(self.bare.model.layers)):
            layer = f"model.layers.{n}"
            plan |= {f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
            plan |= {f"{layer}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
            plan |= {f"{layer}.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        return parallelize_module(self.bare, init_device_mesh("cpu", (SIZE,)), plan)

    def shares(self) -> int:
        return 1

    def clip(self) -> None:
        """DTensors and plain tensors do not go into one norm."""
        gradients = [p.grad for p in self.bare.parameters()]
        split = [g for g in gradients if isinstance(g, DTensor)]
        norms = [torch.nn.utils.get_total_norm(split).full_tensor()]  # type: ignore[attr-defined]
        norms.append(torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)]))
        factor = (1.0 / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)


class HalfOfLlama(nn.Module):
    """Some layers of a Llama, with its embedding or with its norm and head."""

    def __init__(self, model: Any, first: bool) -> None:
        super().__init__()
        half = len(model.model.layers) // 2
        self.embed = model.model.embed_tokens if first else None
        self.layers = model.model.layers[:half] if first else model.model.layers[half:]
        self.norm: Any = None if first else model.model.norm
        self.head: Any = None if first else model.lm_head
        self.rotary = model.model.rotary_emb

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(inputs) if self.embed is not None else inputs
        positions = self.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=positions)
        if self.norm is None or self.head is None:
            return hidden
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


class PP(ByHand):
    def wrap(self) -> nn.Module:
        self.rank = dist.get_rank()
        self.bare = HalfOfLlama(self.bare, first=self.rank == 0)
        stage = PipelineStage(self.bare, self.rank, SIZE, torch.device("cpu"))
        self.weight = 1.0
        self.schedule = Schedule1F1B(stage, 4, loss_fn=self.weighted, scale_grads=False)
        return self.bare  # type: ignore[no-any-return]

    def weighted(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * self.weight

    def backward(self, batches: Sequence[Batch], weight: float) -> torch.Tensor:
        self.weight = weight
        if self.rank == 0:
            self.schedule.step(torch.cat([batch.inputs for batch in batches]))
            return torch.zeros(())
        losses: list[torch.Tensor] = []
        labels = torch.cat([batch.labels for batch in batches])
        self.schedule.step(target=labels, losses=losses, return_outputs=False)
        return torch.stack(losses).sum().detach() / weight

    def clip(self) -> None:
        gradients = [p.grad for p in self.bare.parameters()]
        square = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(square)
        torch.nn.utils.clip_grads_with_norm_(self.bare.parameters(), 1.0, square.sqrt())


class Zero(ByHand):
    """The loop of DeepSpeed's documentation: mean losses, `backward` and `step` for each micro-batch."""

    stage = 0

    def wrap(self) -> nn.Module:
        return self.bare  # type: ignore[no-any-return]

    def __init__(self, model: nn.Module) -> None:
        import deepspeed

        super().__init__(model)
        options = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "steps_per_print": sys.maxsize,
            "zero_allow_untested_optimizer": True,
            # Its default is two gigabytes of buffers, whatever the model's size.
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": sum(p.numel() for p in model.parameters()),
            },
        }
        self.model = deepspeed.initialize(model=model, optimizer=self.optimizer, config=options)[0]

    def held(self) -> list[torch.Tensor]:
        return held_by_deepspeed(self.model)

    def step(self, share: StepShare) -> float:
        total = torch.zeros(())
        for _, batch in share.micro_batches:
            loss = self.loss(batch)
            self.model.backward(loss / batch.labels.numel())
            self.model.step()
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / share.num_targets


class Zero1(Zero):
    stage = 1


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3


BY_HAND: dict[str, type[ByHand]] = {
    "DDP": DDP,
    "FSDP2": FSDP2,
    "TP": TP,
    "PP": PP,
    "ZeRO-1": Zero1,
    "ZeRO-2": Zero2,
    "ZeRO-3": Zero3,
}


def measure(name: str, steps: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Both in turn: seconds, and the most bytes of a rank."""
    warnings.filterwarnings("ignore")
    config = compose([*CONFIG, f"parallel={ENGINES[name]}"])
    engine = training_here(config)
    feed = feed_for(engine, config, windows(config.train.seq_len, count=100_000))
    peer = BY_HAND[name](build(config))
    sides = {
        "ours": lambda number: optimize(engine, feed.step(number), 1e-3, number)[0],
        "peer": lambda number: peer.step(feed.step(number)),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(1, WARMUP + steps + 1):
        losses = {}
        for side in sides if number % 2 else reversed(sides):
            dist.barrier()
            began = time.perf_counter()
            losses[side] = sides[side](number)
            if number > WARMUP:
                seconds[side].append(time.perf_counter() - began)
        assert abs(losses["ours"] - losses["peer"]) < 2e-5, f"step {number}: {losses}"
    held: dict[str, list[torch.Tensor]] = {
        "ours": held_by(engine),
        "peer": peer.held(),
    }
    peaks = {}
    for side, tensors in held.items():
        gc.collect()
        with Peak(tensors) as peak:
            sides[side](WARMUP + steps + 1)
        peaks[side] = _most(peak.most)
    return seconds, peaks


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def _most(count: int) -> int:
    """The largest count of all processes."""
    found = torch.tensor([count])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def run(name: str, steps: int, full: bool) -> list[Row]:
    seconds, peaks = on_ranks(measure, SIZE, name, steps, wait_s=WAIT_S)[0]
    what, peer = f"{name}, 2 processes", f"{name} by hand"
    megabytes = {side: [count / 1e6] * 2 for side, count in peaks.items()}
    return [
        compared(f"step, {what}", "s", seconds["ours"], seconds["peer"], peer, bar=TIME_BAR, full=full),
        compared(f"peak memory, {what}", "MB", megabytes["ours"], megabytes["peer"], peer, bar=MEMORY_BAR, full=full),
    ]


QUICK = {"steps": 2, "engines": ["DDP", "TP"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each side (default 40)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="which (default all)")
    arguments = options_of(parser, QUICK)
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: quartiles need at least 2")
    rows = [row for name in arguments.engines for row in run(name, arguments.steps, arguments.steps >= 40)]
    return finish("engines", rows, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
