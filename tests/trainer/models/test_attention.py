"""Attention by another kernel: the same logits and gradients, packed or not; what this machine lacks is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.models import save_tiny_model
from trainer.errors import Refused
from trainer.models import build_model
from trainer.options.model import Attention, HuggingFace

HERE = [Attention.sdpa, Attention.eager]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kernel_computes_the_same(kind: str, packed: bool, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, kind)
    tokens = torch.arange(2 * 16).reshape(2, 16) % 50
    positions = torch.tensor([[*range(9), *range(7)]] * 2) if packed else None
    found = []
    for attention in [Attention.auto, *HERE]:
        model = build_model(HuggingFace(path=str(tmp_path), attention=attention), seq_len=16, seed=0).eval()
        if attention is not Attention.auto:
            assert model.config._attn_implementation == attention.value
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        logits.square().mean().backward()
        gradient = next(
            p.grad for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "c_attn.weight"))
        )
        found.append((logits.detach(), gradient))
    for logits, gradient in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)
    if packed:  # the control: the second sample does not see the first
        alone = model(input_ids=tokens[:, 9:], use_cache=False).logits
        torch.testing.assert_close(alone, found[0][0][:, 9:], rtol=1e-4, atol=1e-5)


def test_what_is_not_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("trainer.models.is_flash_attn_2_available", lambda: False)
    save_tiny_model(tmp_path)
    for attention, why in (("flash_attention_2", "flash-attn, and a GPU"), ("flex_attention", "on a GPU only")):
        config = HuggingFace(path=str(tmp_path), attention=Attention[attention])
        with pytest.raises(Refused, match=rf"{attention} cannot be used here: .*{why}\. Type model\.attention=auto"):
            build_model(config, seq_len=16, seed=0, device="meta")
    # What a model itself does not have.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    save_tiny_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(
        Refused, match=r"GPT2LMHeadModel does not support .* flex_attention\. Type model\.attention=auto"
    ):
        build_model(
            HuggingFace(path=str(tmp_path / "gpt2"), attention=Attention.flex_attention),
            seq_len=16,
            seed=0,
            device="meta",
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_flex_attention_on_a_gpu(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    tokens = torch.arange(2 * 16).reshape(2, 16).cuda() % 50
    losses = []
    for attention in (Attention.sdpa, Attention.flex_attention):
        model = build_model(HuggingFace(path=str(tmp_path), attention=attention), seq_len=16, seed=0).cuda()
        loss = model(input_ids=tokens, use_cache=False).logits.square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
