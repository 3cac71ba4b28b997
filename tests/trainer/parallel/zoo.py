"""One small model of each family, each at once with an odd vocabulary, an odd number of layers and uneven heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.harness.models import VOCABULARY, tokenizer

_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 256}
_GQA = {
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GQA},
    "llama_tied": {"model_type": "llama", **_GQA, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_GQA, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **_GQA},
    "qwen3": {"model_type": "qwen3", **_GQA, "head_dim": 4, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **_GQA, "head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 1},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 12,
        "n_layer": 3,
        "n_head": 3,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 24,
        "intermediate_size": 29,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "tie_word_embeddings": False,
    },
    "phi3": {"model_type": "phi3", **_GQA, "num_attention_heads": 3, "num_key_value_heads": 1, "pad_token_id": 0},
    "mixtral": {
        "model_type": "mixtral",
        **_GQA,
        "intermediate_size": 32,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
}


def save_model(directory: Path, name: str) -> None:
    """With its tokenizer, as the hub would hold it."""
    options = {**_COMMON, **MODELS[name]}
    torch.manual_seed(3)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hide what is cut wrongly
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
