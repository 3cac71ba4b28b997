"""Small Hugging Face models with a tokenizer, saved to a directory: what the hub would hold."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 257  # prime: one token a byte, and the end


def save_tiny_model(directory: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> None:
    """A model of a few thousand parameters, with tied weights and an odd vocabulary."""
    torch.manual_seed(3)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=12, n_layer=3, n_head=3)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=29,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, as GPT-2's, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", clean_up_tokenization_spaces=False)
