"""LoRA: a no-op at the start, only adapters train, everything follows from the seed."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import Refused
from trainer.methods.lora import LoraMethod
from trainer.models import build_model, draws_randomness
from trainer.options.config import Config
from trainer.options.method import Lora
from trainer.options.model import TinyLlama
from trainer.options.train import Train


def model(config: Lora, seed: int = 0) -> torch.nn.Module:
    whole = Config(method=config, train=Train(seed=seed))
    return LoraMethod(whole).attach(build_model(TinyLlama(), seq_len=8, seed=0))


def test_the_output_is_bitwise_the_base_at_the_start() -> None:
    tokens = torch.arange(8)[None]
    base = build_model(TinyLlama(), seq_len=8, seed=0)(input_ids=tokens).logits
    assert torch.equal(model(Lora())(input_ids=tokens).logits, base)


def test_only_adapters_train_and_their_number_is_the_rank_times_the_widths() -> None:
    adapted = model(Lora(r=3))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    widths = {
        "q": 256 + 256,
        "k": 256 + 128,
        "v": 256 + 128,
        "o": 256 + 256,
        "gate": 256 + 688,
        "up": 256 + 688,
        "down": 688 + 256,
    }
    assert sum(p.numel() for p in trained.values()) == 4 * 3 * sum(widths.values())


def test_adapters_follow_from_the_seed() -> None:
    def first(m: torch.nn.Module) -> torch.Tensor:
        return next(p for n, p in m.named_parameters() if "lora_A" in n)

    assert torch.equal(first(model(Lora(), 1)), first(model(Lora(), 1)))
    assert not torch.equal(first(model(Lora(), 1)), first(model(Lora(), 2)))


def test_dropout_is_seen_as_randomness() -> None:
    assert draws_randomness(model(Lora(dropout=0.1))) and not draws_randomness(model(Lora()))


def test_targets_by_name_and_targets_that_do_not_exist() -> None:
    adapted = model(Lora(target_modules=["q_proj", "v_proj"]))
    assert {n.split(".")[-4] for n, p in adapted.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    for targets in (["nowhere"], ["q_proj", "nowhere"]):
        with pytest.raises(Refused, match=r"has no module called 'nowhere'\. Its linear layers are called down_proj, "):
            model(Lora(target_modules=targets))
    one = model(Lora(target_modules=["q_proj"]))
    assert {n.split(".")[-4] for n, p in one.named_parameters() if p.requires_grad} == {"q_proj"}
    with pytest.raises(Refused, match="does not fit the model") as refused:
        model(Lora(target_modules=["layers"]))
    assert "\n" not in str(refused.value)
