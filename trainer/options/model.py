"""Options of the model; a choice of the group is a class."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from trainer.errors import Refused
from trainer.options.field import free, option

# OmegaConf reads these annotations at run time and knows Optional[int], not int | None.


class Attention(Enum):
    """Kernels of attention, by transformers' names."""

    auto = "auto"  # what transformers takes for a model: torch's scaled_dot_product_attention in nearly all
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"  # needs the package flash-attn and a GPU
    flex_attention = "flex_attention"  # trains on a GPU only
    eager = "eager"


@dataclass
class Model:
    attention: Attention = free(Attention.auto)  # which kernel computes it; only rounding differs
    lr: float = free(MISSING)  # the learning rate that suits this model, where optimizer.lr is not given


@dataclass
class TinyLlama(Model):
    """A Llama of about three million parameters with random weights and one token a byte."""

    lr: float = option(1e-3, low=0, free=True)
    hidden_size: int = option(256, low=1)
    intermediate_size: int = option(688, low=1)
    num_layers: int = option(4, low=1)
    num_heads: int = option(8, low=1)
    num_kv_heads: int = option(4, low=1)
    vocab_size: int = option(256, low=256)  # at least one token a byte
    dropout: float = option(0.0, low=0, high=1)  # on attention weights

    def refuse(self) -> None:
        """Refuse sizes that do not split into heads."""
        if self.hidden_size % (2 * self.num_heads):
            fitting = 2 * self.num_heads * max(1, self.hidden_size // (2 * self.num_heads))
            raise Refused(
                f"model.hidden_size={self.hidden_size} does not split into model.num_heads={self.num_heads} heads of "
                f"an even size. Type model.hidden_size={fitting}."
            )
        if self.num_heads % self.num_kv_heads:
            raise Refused(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}. "
                f"Type model.num_kv_heads={self.num_heads} or another divisor."
            )


@dataclass
class HuggingFace(Model):
    """Any causal language model of the Hugging Face hub or a local directory, with its tokenizer."""

    lr: float = option(2e-5, low=0, free=True)
    path: str = free(MISSING)  # a local directory or a hub id such as meta-llama/Llama-3.2-1B
    revision: Optional[str] = None  # of a hub id: a branch, tag or commit
    trust_remote_code: bool = False  # run code that comes with the model
