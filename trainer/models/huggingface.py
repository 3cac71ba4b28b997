"""Causal language models and tokenizers of Hugging Face, from a local directory or the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.config import HuggingFace
from trainer.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from trainer.errors import Refused


def load_tokenizer(config: HuggingFace) -> Tokenizer:
    return HuggingFaceTokenizer(_load(AutoTokenizer, config, "tokenizer"))


def build(config: HuggingFace, seq_len: int) -> nn.Module:
    """The model with its weights as fp32, on the current default device; on `meta` its shapes only."""
    settings = _load(AutoConfig, config, "configuration")
    longest = getattr(settings, "max_position_embeddings", None)
    if isinstance(longest, int) and seq_len > longest:
        raise Refused(
            f"train.seq_len={seq_len} is more than the {longest} positions of {config.path}. "
            f"Type train.seq_len={longest}."
        )
    if torch.get_default_device().type == "meta":
        model = AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, trust_remote_code=config.trust_remote_code
        )
    else:
        model = _load(AutoModelForCausalLM, config, "model", dtype=torch.float32)
    assert isinstance(model, nn.Module)
    return model.train()  # from_pretrained leaves it in evaluation mode, without dropout


def _load(loader: Any, config: HuggingFace, what: str, **options: Any) -> Any:
    """`from_pretrained`, with what goes wrong in it as one paragraph."""
    local = Path(config.path).expanduser()
    path = str(local) if local.exists() else config.path
    try:
        return loader.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        logging.getLogger(__name__).debug("loading the %s failed", what, exc_info=True)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise Refused(
            f"The {what} of model.path={config.path} cannot be loaded: {reason} "
            "Give a directory that save_pretrained wrote, tokenizer included, or a hub id that this machine can reach."
        ) from error
