"""Optimizers of sparse values: Adam with an age of its own for every entry, and SM3 over rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from checkpointing import Slice
from trainer.methods.method import Host
from trainer.methods.sparse.layer import SparseLayer


class EntryAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) whose bias correction counts the steps of every entry.

    An entry that was selected late is corrected as if its training had begun then. State of a parameter's shape:
    `exp_avg`, `exp_avg_sq` and `age`, in steps. Every operation is elementwise, so that a shard computes what the whole
    would.
    """

    MOMENTS = ("exp_avg", "exp_avg_sq", "age")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def prepare(self) -> None:
        """Create all state before the first step, so that it can be described and loaded."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(p)

    def _state_of(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[p]
        if not state:
            for key in self.MOMENTS:
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # called without one
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state_of(p)
                value, gradient, mean, square, age = (
                    _local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["age"])
                )
                age.add_(1)
                mean.lerp_(gradient, 1 - beta1)
                square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                value.mul_(1 - group["lr"] * group["weight_decay"])
                root = (square / (1 - beta2**age)).sqrt_().add_(group["eps"])
                value.sub_((mean / (1 - beta1**age)).div_(root).mul_(group["lr"]))


class EntrySM3(torch.optim.Optimizer):
    """SM3 (Anil et al. 2019, arXiv:1901.11150) over the rows and columns of the weight, without momentum.

    An entry's second moment is the smaller of its row's and its column's accumulator, plus its squared gradient; each
    accumulator becomes the largest of its entries'. They are kept with the layers and are the same on all ranks.
    """

    def __init__(self, params: Any, lr: float = 1e-3, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self._host: Host | None = None
        self._layers: dict[torch.Tensor, SparseLayer] = {}  # by their values

    def place(self, host: Host, layers: Iterable[SparseLayer]) -> None:
        """Learn, before the first step, which entries the tensors of the param groups hold."""
        self._host, self._layers = host, {layer.sparse_values: layer for layer in layers}

    def prepare(self) -> None:
        """There is no state by parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # called without one
        assert closure is None and self._host is not None
        for group in self.param_groups:
            touched: list[SparseLayer] = []
            news: list[torch.Tensor] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                values, gradients = _local(p).reshape(-1), _local(p.grad).reshape(-1)
                for part in self._host.held_of(p):
                    at = slice(part.position, part.position + part.length)
                    touched.append(self._layers[part.parameter])
                    news += self._update(touched[-1], part, values[at], gradients[at], group)
            self._keep(touched, news)

    def _update(
        self, layer: SparseLayer, part: Slice, value: torch.Tensor, gradient: torch.Tensor, options: dict[str, Any]
    ) -> list[torch.Tensor]:
        rows, columns = accumulators(layer)
        here = layer.sparse_indices[part.start : part.start + part.length].long()
        row, column = here // layer.shape[1], here % layer.shape[1]
        # Offloaded values are in host memory, and what is shared between ranks is on their devices.
        second = torch.minimum(rows[row], columns[column]) + gradient.square().to(rows.device)
        value.mul_(1 - options["lr"] * options["weight_decay"])
        value.sub_(gradient / (second.sqrt() + options["eps"]).to(value.device), alpha=options["lr"])
        return [
            torch.zeros_like(rows).scatter_reduce_(0, row, second, "amax"),
            torch.zeros_like(columns).scatter_reduce_(0, column, second, "amax"),
        ]

    def _keep(self, layers: list[SparseLayer], news: list[torch.Tensor]) -> None:
        if not news:
            return
        flat, group = torch.cat(news), None if self._host is None else self._host.layer_group
        if group is not None:
            dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
        parts = torch.split(flat, [part.numel() for part in news])
        for number, layer in enumerate(layers):
            for kept, new in zip(accumulators(layer), parts[2 * number : 2 * number + 2], strict=True):
                kept.copy_(torch.maximum(kept, new))


def accumulators(layer: SparseLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """SM3's of the rows and of the columns of a layer's weight, fp32."""
    if not hasattr(layer, "sm3"):
        device = layer.sparse_indices.device
        object.__setattr__(layer, "sm3", tuple(torch.zeros(size, device=device) for size in layer.shape))
    found: tuple[torch.Tensor, torch.Tensor] = layer.sm3  # type: ignore[assignment]
    return found


def _local(tensor: torch.Tensor | nn.Parameter) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
