"""Parts of micro-batches, and draws that depend on what they are for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.compose import compose
from trainer.data.dataset import IGNORE, Batch
from trainer.methods import build
from trainer.models import blocks
from trainer.parallel import computing
from trainer.parallel.computing import BatchPart, Draws, parts_of, summed_loss


def batch(rows: int) -> Batch:
    inputs = torch.arange(rows * 4).reshape(rows, 4) % 7
    return Batch(inputs, inputs + 1, np.arange(rows))


def test_parts_know_their_micro_batch() -> None:
    parts = list(parts_of([(11, batch(3)), (12, batch(2))], 2, torch.device("cpu")))
    assert [(part.key, part.number, len(part.batch.inputs)) for part in parts] == [(11, 0, 2), (11, 1, 1), (12, 0, 2)]


def test_the_loss_is_a_sum_over_targets() -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, IGNORE]])
    chances = logits.log_softmax(-1)
    torch.testing.assert_close(summed_loss(logits, labels), -(chances[0, 0, 1] + chances[0, 2, 2]))
    assert summed_loss(logits, torch.full_like(labels, IGNORE)) == 0


class Largest(TorchDispatchMode):
    """The most numbers that a tensor of fp32 had which an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 100, 1000])
def test_by_parts_it_is_the_same_loss_and_gradient(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start = (4 * torch.randn(2, 9, 37)).to(dtype)
    labels = torch.randint(0, 37, (2, 9))
    labels[0, :4] = IGNORE

    def computed(limit: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        monkeypatch.setattr(computing, "AT_ONCE", limit)
        logits = start.clone().requires_grad_()
        with Largest() as seen:
            loss = summed_loss(logits, labels)
            (loss * 0.3).backward()
        assert logits.grad is not None and logits.grad.dtype == dtype
        return loss.detach(), logits.grad, seen.numel

    whole, by_parts = computed(10**9), computed(at_once)
    torch.testing.assert_close(by_parts[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(by_parts[1], whole[1], rtol=1e-6 if dtype is torch.float32 else 1e-2, atol=1e-7)
    assert (by_parts[1][0, :4] == 0).all()
    if dtype is torch.bfloat16:
        assert by_parts[2] <= max(at_once, 37) or at_once == 1000
        assert whole[2] == start.numel()  # the control: at once all of it is in fp32


def test_a_layer_draws_the_same_whatever_was_computed_before_it() -> None:
    model = build(compose(["model.num_layers=3", "model.hidden_size=32", "model.dropout=0.5"])).train()
    layers, drawn = blocks(model), []
    draws = Draws(model, {layer: index for index, layer in enumerate(layers)})
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1).item()))
    inputs = torch.arange(8)[None]
    for key in (5, 6, 5):
        draws.start(BatchPart(batch(1), key, 0))
        model(input_ids=inputs)
    assert drawn[:3] == drawn[6:] and len(set(drawn)) == 6
    draws.start(BatchPart(batch(1), 5, 0))
    torch.rand(1)  # another layer before it, or none: a stage of a pipeline
    hidden = torch.randn(1, 8, 32)
    layers[1](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(8)[None]))
    assert drawn[-1] == drawn[1]
