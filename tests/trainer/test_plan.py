"""The plan: degrees, batches and memory, and what is refused with the override to type."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.compose import compose
from trainer.config import Parallel
from trainer.errors import Refused
from trainer.models import blocks
from trainer.parallel.optimizing import make_optimizer
from trainer.plan import Topology, plan_batch, plan_memory, resolve_topology
from trainer.run import build, count

CONFIG = compose([])


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "expected"),
    [
        (None, 1, 4, (4, 1)),
        (None, 2, 4, (2, 2)),
        (None, 4, 4, (1, 4)),
        (None, -1, 4, (1, 4)),
        (-1, 1, 3, (3, 1)),
        (1, -1, 3, (1, 3)),
        (2, -1, 6, (2, 3)),
        (2, 3, 6, (2, 3)),
        (None, 1, 1, (1, 1)),
        (None, -1, 1, (1, 1)),
    ],
)
def test_degrees_fill_the_world(replicate: int | None, shard: int, world: int, expected: tuple[int, int]) -> None:
    topology = resolve_topology(Parallel(dp_replicate=replicate, dp_shard=shard), world)
    assert (topology.dp_replicate, topology.dp_shard) == expected and topology.data_size == world


@pytest.mark.parametrize(
    ("replicate", "shard", "world", "message"),
    [
        (None, 3, 4, r"Type parallel\.dp_replicate=2 parallel\.dp_shard=2, or start a multiple of 3 processes"),
        (2, 2, 3, r"Type parallel\.dp_replicate=3 parallel\.dp_shard=1, or start 4 processes"),
        (1, 2, 4, r"does not make up the 4 process\(es\)"),
        (-1, -1, 4, "Only one degree can fill the world"),
        (0, 1, 1, r"parallel\.dp_replicate=0 must be at least 1"),
        (1, -2, 1, r"parallel\.dp_shard=-2 must be at least 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(replicate: int | None, shard: int, world: int, message: str) -> None:
    with pytest.raises(Refused, match=message):
        resolve_topology(Parallel(dp_replicate=replicate, dp_shard=shard), world)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 9))
def test_batches_are_refused_only_when_not_a_multiple(total: int, micro: int, size: int) -> None:
    config = CONFIG
    config.train.global_batch, config.train.micro_batch = total, micro
    try:
        plan = plan_batch(config, size)
    except Refused as refused:
        assert total % micro
        for part in str(refused).split("Type ")[1].rstrip(".").replace(", or ", " or ").split(" or "):
            key, _, value = part.partition("=")
            setattr(config.train, key.removeprefix("train."), int(value))
            plan_batch(config, size)  # what it says to type works
            config.train.global_batch, config.train.micro_batch = total, micro
        return
    assert total % micro == 0
    assert plan.num_micro_batches * micro == total
    assert plan.rounds * size == plan.num_micro_batches + plan.idle and 0 <= plan.idle < size


def test_local_batch_must_fit() -> None:
    for bad in (0, 3):
        with pytest.raises(Refused, match=rf"parallel\.local_batch={bad} must lie between"):
            plan_batch(compose([f"parallel.local_batch={bad}"]), 1)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("shards", [1, 3])
def test_memory_of_the_state_is_exact(method: str, shards: int) -> None:
    config = compose([f"method={method}"])
    model = build(config)
    memory = plan_memory(config, model, Topology(1, shards), max(map(count, blocks(model))))
    optimizer = make_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    moments = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert memory.parameters == math.ceil(sum(p.nbytes for p in model.parameters()) / shards)
    assert memory.gradients == math.ceil(gradients / shards)
    assert memory.optimizer == math.ceil(moments / shards)
    assert (memory.gathered > 0) == (shards > 1)


def test_memory_of_activations_is_of_the_right_size() -> None:
    config = compose(["train.micro_batch=4", "train.seq_len=256", "train.global_batch=4"])
    model = build(config)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        tokens = torch.zeros(4, 256, dtype=torch.long)
        logits = model(input_ids=tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        estimate = plan_memory(config, model, Topology(1, 1), 0).activations
        assert 0.5 < estimate / sum(kept.values()) < 2
