"""A Llama small enough to learn something on a laptop within minutes, from random weights."""

from __future__ import annotations

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.data.tokenizer import ByteTokenizer, Tokenizer
from trainer.elastic.randomness import reseed
from trainer.options.model import TinyLlama


def load_tokenizer(config: TinyLlama) -> Tokenizer:
    return ByteTokenizer()


def build(config: TinyLlama, seq_len: int, seed: int) -> nn.Module:
    """The model on the current default device, its weights a function of the seed."""
    reseed(seed, "model")
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            attention_dropout=config.dropout,
            max_position_embeddings=max(seq_len, 2048),
            bos_token_id=None,
            eos_token_id=ByteTokenizer.eos,
            pad_token_id=ByteTokenizer.eos,
        )
    )
    return model
