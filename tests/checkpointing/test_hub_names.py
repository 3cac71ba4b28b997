"""Experts that transformers computes as one tensor: out and in, under the names that it gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from checkpointing import DamagedError, MismatchError, describe, export, load, save, stream
from checkpointing.__main__ import main
from checkpointing.foreign import describe_foreign
from checkpointing.hub_names import _place, places

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 6, "tie_word_embeddings": True, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4},
}


def model_of(kind: str) -> Any:
    torch.manual_seed(1)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **heads, **FAMILIES[kind]))


def exported(run: Path, out: Path, config: Path, *more: str) -> int:
    return main(["export", str(run), "--to", "hf", str(out), "--config", str(config), *more])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", FAMILIES)
def test_out_and_in_they_are_what_transformers_writes_and_reads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PART_BYTES", 200)  # several parts an expert
    model = model_of(kind)
    assert any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "theirs")
    save(tmp_path / "run", 1, describe(model))
    assert exported(tmp_path / "run", tmp_path / "ours", tmp_path / "theirs") == 0
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert any(".experts.2." in name for name in ours) and same(ours, theirs)
    monkeypatch.setattr(export.export_hugging_face, "__kwdefaults__", {"dtype": None, "file_bytes": 3000})
    assert exported(tmp_path / "run", tmp_path / "files", tmp_path / "theirs", "--dtype", "bf16") == 0
    index = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == theirs.keys()
    assert same(weights(tmp_path / "files"), {name: tensor.bfloat16() for name, tensor in theirs.items()})
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert same(loaded.state_dict(), model.state_dict())
    save(tmp_path / "again", 0, describe_foreign(tmp_path / "theirs").pieces)
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert not same(fresh.state_dict(), model.state_dict())
    load(tmp_path / "again", describe(fresh))
    assert same(fresh.state_dict(), model.state_dict())
    # The comparison sees two experts that changed places.
    one, other = (next(name for name in theirs if f".experts.{n}." in name) for n in (0, 1))
    theirs[one], theirs[other] = theirs[other], theirs[one]
    assert not same(ours, theirs)


def test_another_models_description_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("mixtral")
    save(tmp_path / "run", 1, describe(model))
    model.config.num_local_experts = 4
    model.config.save_pretrained(tmp_path / "more")
    assert exported(tmp_path / "run", tmp_path / "out", tmp_path / "more") == 2
    assert "describes another model: model.layers.0.mlp.experts.down_proj" in capsys.readouterr().err
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "of my own"}')
    assert exported(tmp_path / "run", tmp_path / "out", tmp_path / "unknown") == 2
    assert "`python -m trainer.methods merge RUN DIR`" in capsys.readouterr().err and not (tmp_path / "out").exists()
    model_of("mixtral").save_pretrained(tmp_path / "theirs")
    found = weights(tmp_path / "theirs")
    name = next(name for name in found if ".experts.0." in name)
    save_file({**found, name: found[name][1:].clone()}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(DamagedError, match=r"is of shape .* by its config\.json"):
        describe_foreign(tmp_path / "theirs")


def test_what_is_no_box_of_a_tensor_has_no_place(tmp_path: Path) -> None:
    base = torch.empty(2, 6, 4, device="meta")
    found = _place("a", base, base[1][2:4])
    assert found is not None and (found.box.offset, found.box.size, found.shape) == ((1, 2, 0), (1, 2, 4), (2, 4))
    for other in (base.transpose(1, 2), base[:, ::2], base.view(4, 3, 4)[1:3], base.view(1, 2, 6, 4)):
        assert _place("a", base, other) is None
    AutoConfig.for_model("gpt_oss", **SIZES, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path)
    try:
        placed, shapes = places(tmp_path)
    except MismatchError as error:
        assert "trainer.methods merge" in str(error)
    else:
        assert {place.tensor for place in placed.values()} == shapes.keys()
