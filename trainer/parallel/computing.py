"""The computation of every engine: a model called on part of a logical micro-batch, its summed loss, its draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from checkpointing import Held
from trainer.data.dataset import IGNORE, Batch
from trainer.elastic.randomness import reseed
from trainer.models import draws_randomness
from trainer.options.precision import Compute

# Of a model as this rank computes with it; by the logical names of parameters, of what it holds a part after a cut.
MakeOptimizer = Callable[[nn.Module, Mapping[str, Held]], torch.optim.Optimizer]
AT_ONCE = 1 << 25  # logits that are in fp32 at a time: 128 MiB
# What matrix products are computed in where that is not fp32.
LOW: dict[Compute, torch.dtype] = {Compute.bf16: torch.bfloat16, Compute.fp16: torch.float16}


@dataclass(frozen=True)
class BatchPart:
    """A micro-batch, or part `number` of one that is split, to be computed at a time; `key` starts its draws."""

    batch: Batch
    key: int
    number: int


def parts_of(
    micro_batches: Sequence[tuple[int, Batch]], local_batch: int | None, device: torch.device
) -> Iterator[BatchPart]:
    for key, batch in micro_batches:
        for number, part in enumerate(batch.to(device).split(local_batch)):
            yield BatchPart(part, key, number)


def computed_in(low: torch.dtype | None, device: torch.device) -> torch.autocast:
    """Matrix products in low precision; None leaves them in fp32."""
    return torch.autocast(device.type, dtype=low or torch.bfloat16, enabled=low is not None)


def logits_of(
    model: nn.Module, inputs: torch.Tensor, positions: torch.Tensor | None = None, *, low: torch.dtype | None
) -> torch.Tensor:
    """Logits of shape [rows, width, vocabulary]. Where `positions` begin again, attention does (data/packing.py)."""
    more = {} if positions is None else {"position_ids": positions}
    with computed_in(low, inputs.device):
        logits: torch.Tensor = model(input_ids=inputs, use_cache=False, **more).logits
    return logits


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over the targets, in fp32; `logits` of shape [rows, width, vocabulary].

    Of a long batch never all logits are in fp32 at a time: they take more memory than the model's layers.
    """
    flat, targets = logits.flatten(0, 1), labels.flatten()
    if flat.numel() > AT_ONCE:
        total: torch.Tensor = _SummedLoss.apply(flat, targets)  # type: ignore[no-untyped-call]
        return total
    return cross_entropy(flat.float(), targets, ignore_index=IGNORE, reduction="sum")


class _SummedLoss(torch.autograd.Function):
    """Cross entropy by parts of the rows; what the backward needs beside the logits is a number a row."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logits.device)
        norms = torch.empty(len(targets), device=logits.device)
        for part in _parts(logits):
            wide = logits[part].float()
            norms[part] = wide.logsumexp(1)
            counts = targets[part] != IGNORE
            picked = wide.gather(1, targets[part].where(counts, 0)[:, None])[:, 0]
            total += (norms[part] - picked).where(counts, 0).sum()
        ctx.save_for_backward(logits, targets, norms)
        return total

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part in _parts(logits):
            counts = targets[part] != IGNORE
            chances = (logits[part].float() - norms[part, None]).exp_()
            chances.scatter_add_(1, targets[part].where(counts, 0)[:, None], chances.new_full((len(chances), 1), -1.0))
            gradient[part] = chances.mul_(given * counts[:, None])
        return gradient, None


def _parts(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


class Draws:
    """Random draws of a forward keyed by micro-batch, part and layer, so that no layout changes them.

    A layer starts at a key of its own: where a pipeline's stage computes only some layers, they draw the same.
    """

    def __init__(self, model: nn.Module, layers: Mapping[nn.Module, int]) -> None:
        """`layers` are those that this rank computes, each with its number among all."""
        self._key, self._number = 0, 0
        if draws_randomness(model):
            for layer, index in layers.items():
                layer.register_forward_pre_hook(self._before(index))

    def start(self, part: BatchPart) -> None:
        """Begin the draws of a part."""
        self._key, self._number = part.key, part.number
        reseed(part.key, part.number)

    def _before(self, index: int) -> Any:
        def hook(layer: nn.Module, _: Any) -> None:
            if layer.training:
                reseed(self._key, self._number, index)

        return hook


def set_lr(groups: list[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of a step in all param groups."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
