"""Families of models, as tensor parallelism needs to know them: which tensors are cut, and along what.

One entry a `model_type` of transformers. Paths are those inside a layer. A family without an entry is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What a dimension is made of: query heads; key or value heads; query, key and value of one head side by side; anything
# else that can be cut anywhere, such as the inner width of an MLP.
Units = tuple[str, ...]
Q, KV, QKV, INNER = "query heads", "key-value heads", "heads", "inner"


@dataclass(frozen=True)
class Family:
    """`regions` compute on a share of the heads or of the inner width: all ranks' outputs add up to the layer's."""

    regions: tuple[str, ...]
    outputs: dict[str, Units]  # linear layers whose outputs are cut
    inputs: dict[str, Units]  # linear layers whose inputs are cut, and whose outputs are added up
    tensors: dict[str, tuple[int, Units]] = field(default_factory=dict)  # other parameters: the dimension that is cut
    partial: tuple[str, ...] = ()  # modules whose outputs are added up, without being linear layers themselves


_LLAMA = Family(
    regions=("self_attn", "mlp"),
    outputs={
        "self_attn.q_proj": (Q,),
        "self_attn.k_proj": (KV,),
        "self_attn.v_proj": (KV,),
        "mlp.gate_proj": (INNER,),
        "mlp.up_proj": (INNER,),
    },
    inputs={"self_attn.o_proj": (Q,), "mlp.down_proj": (INNER,)},
)
_EXPERTS = Family(
    regions=("self_attn", "mlp"),
    outputs={path: units for path, units in _LLAMA.outputs.items() if path.startswith("self_attn")},
    inputs={"self_attn.o_proj": (Q,)},
    tensors={"mlp.experts.gate_up_proj": (1, (INNER, INNER)), "mlp.experts.down_proj": (2, (INNER,))},
    partial=("mlp",),
)
_PHI3 = Family(
    regions=("self_attn", "mlp"),
    outputs={"self_attn.qkv_proj": (Q, KV, KV), "mlp.gate_up_proj": (INNER, INNER)},
    inputs=_LLAMA.inputs,
)
_GPT2 = Family(
    regions=("attn", "mlp"),
    outputs={"attn.c_attn": (Q, Q, Q), "mlp.c_fc": (INNER,)},
    inputs={"attn.c_proj": (Q,), "mlp.c_proj": (INNER,)},
)
_GPT_NEOX = Family(
    regions=("attention", "mlp"),
    outputs={"attention.query_key_value": (QKV,), "mlp.dense_h_to_4h": (INNER,)},
    inputs={"attention.dense": (Q,), "mlp.dense_4h_to_h": (INNER,)},
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "mixtral": _EXPERTS,
}
