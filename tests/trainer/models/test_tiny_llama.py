"""The tiny Llama: from its seed, and of a size that a laptop trains."""

from __future__ import annotations

import torch

from trainer.models import build_model
from trainer.options.model import TinyLlama


def test_the_tiny_llama_follows_from_its_seed() -> None:
    a, b, other = (build_model(TinyLlama(), seq_len=16, seed=seed) for seed in (1, 1, 2))
    weights = [next(m.parameters()) for m in (a, b, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 2e6 < sum(p.numel() for p in a.parameters()) < 5e6
    assert all(p.dtype == torch.float32 for p in a.parameters())


def test_shapes_alone_on_meta() -> None:
    model = build_model(TinyLlama(), seq_len=16, seed=1, device="meta")
    real = build_model(TinyLlama(), seq_len=16, seed=1)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in model.parameters())
