"""The count of operations, by hand; and peaks that are known, given, or neither."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from trainer.options.precision import Compute
from trainer.utilization import full_speed, operations

SIZES = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
CPU = torch.device("cpu")


def test_operations_by_hand() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_key_value_heads=2))
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 12  # query and output, key and value, the three of the MLP
    matrices = 2 * layer + 8 * 50  # and the head; the embedding is looked up
    assert operations(model, 16) == 6 * matrices + 12 * 2 * 8 * 16
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert operations(model, 16) == 4 * matrices + 12 * 2 * 8 * 16


def test_of_experts_those_that_a_token_goes_through() -> None:
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    )
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 8 * 4 + 2 * 3 * 8 * 12  # with the router, and two experts
    assert operations(model, 1) == 6 * (2 * layer + 8 * 50) + 12 * 2 * 8


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    assert full_speed(model, 16, CPU, Compute.bf16, 0) is None
    assert full_speed(model, 16, CPU, Compute.fp32, 2.0) == 2e12 / operations(model, 16)
    devices = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H200 NVL": 835,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA L40S": 362,
        "NVIDIA A10G": 70,
        "NVIDIA RTX A1000": 0,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": 0,
    }
    for name, peak in devices.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found = full_speed(model, 16, torch.device("cuda"), Compute.bf16, 0)
        assert found == (pytest.approx(peak * 1e12 / operations(model, 16)) if peak else None), name
        assert full_speed(model, 16, torch.device("cuda"), Compute.fp32, 0) is None
