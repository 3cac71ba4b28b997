"""Parts of micro-batches, and draws that depend on what they are for."""

from __future__ import annotations

import numpy as np
import torch

from trainer.compose import compose
from trainer.data.dataset import IGNORE, Batch
from trainer.methods import build
from trainer.models import blocks
from trainer.parallel.computing import Draws, Part, parts_of, summed_loss


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


def test_a_layer_draws_the_same_whatever_was_computed_before_it() -> None:
    model = build(compose(["model.num_layers=3", "model.hidden_size=32", "model.dropout=0.5"])).train()
    layers, drawn = blocks(model), []
    draws = Draws(model, {layer: index for index, layer in enumerate(layers)})
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1).item()))
    inputs = torch.arange(8)[None]
    for key in (5, 6, 5):
        draws.start(Part(batch(1), key, 0))
        model(input_ids=inputs)
    assert drawn[:3] == drawn[6:] and len(set(drawn)) == 6
    draws.start(Part(batch(1), 5, 0))
    torch.rand(1)  # another layer before it, or none: a stage of a pipeline
    hidden = torch.randn(1, 8, 32)
    layers[1](hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(8)[None]))
    assert drawn[-1] == drawn[1]
