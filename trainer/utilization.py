"""Model FLOPs utilization: the share of the devices' peak that a run's useful arithmetic takes.

MFU and its count of operations are those of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): what is
computed again for the backward does not count, nor does padding.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from trainer.options.precision import Compute

# Peak of dense bf16 arithmetic on tensor cores with fp32 sums, in 1e12 operations a second, by a part of the device's
# name; from the vendors' data sheets. Of several that match the first counts.
PEAKS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "MI300X": 1307.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def full_speed(
    model: nn.Module, seq_len: int, device: torch.device, compute: Compute, peak_tflops: float
) -> float | None:
    """Tokens a second of one device at its peak; None where the peak is not known, as of fp32 and of CPUs.

    `peak_tflops` is what a person gave, 0 for nothing.
    """
    peak = peak_tflops
    if not peak and device.type == "cuda" and compute is not Compute.fp32:
        name = torch.cuda.get_device_name(device)
        # Whole words: there is an RTX A1000. A part of a device (MIG) has a part of its peak.
        known = (value for part, value in PEAKS.items() if re.search(rf"\b{part}\b", name) and "MIG" not in name)
        peak = next(known, 0.0)
    return peak * 1e12 / operations(model, seq_len) if peak else None


def operations(model: nn.Module, seq_len: int) -> float:
    """The operations of one token in a sample of `seq_len`, forward and backward.

    Two for each element of a matrix forward, two for the gradient of its input, and two for its own where it trains.
    Attention is over the whole sample, as in the paper. Of experts those that a token goes through.
    """
    config = getattr(model, "config", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    active = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2:
                share = active if parameter.dim() == 3 else 1.0
                total += share * parameter.numel() * (6 if parameter.requires_grad else 4)
    heads, layers = getattr(config, "num_attention_heads", 0), getattr(config, "num_hidden_layers", 0)
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    return total + 12 * layers * heads * size * seq_len
