"""Which linear layers are targeted, by name."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods.targets import ALL, check_targets, check_untied, targeted
from trainer.models import build_model

MODEL = build_model(compose(["model.num_layers=2"]).model, seq_len=8, seed=0)


def test_all_linear_layers_but_the_output_in_the_models_order() -> None:
    names = list(targeted(MODEL, [ALL], "method"))
    assert len(names) == 14 and names[0] == "model.layers.0.self_attn.q_proj" and "lm_head" not in names
    assert list(targeted(MODEL, ["down_proj", "q_proj"], "method")) == [
        n for n in names if n.endswith(("down_proj", "q_proj"))
    ]
    assert list(targeted(MODEL, ["layers.1.mlp.up_proj"], "method")) == ["model.layers.1.mlp.up_proj"]


def test_names_that_are_not_there_and_names_of_no_linear_layer_are_refused() -> None:
    with pytest.raises(Refused, match="the model has no module called 'proj'"):
        check_targets(MODEL, ["proj"])
    with pytest.raises(Refused, match=r"names no linear layer\. Type method\.target_modules=\[all-linear\]"):
        targeted(MODEL, ["layers"], "method")


def test_a_layer_that_shares_its_weight_is_refused() -> None:
    model: Any = build_model(compose(["model.num_layers=1", "model.hidden_size=16"]).model, seq_len=8, seed=0)
    check_untied(model, ["lm_head", "embed_tokens", "q_proj"])
    model.lm_head.weight = model.model.embed_tokens.weight
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(Refused, match=f"{target} shares its weight with .*tie_word_embeddings=false"):
            check_untied(model, ["q_proj", target])
    check_untied(model, ["q_proj", ALL])  # which leaves the output out
