"""Tensors that have other names in directories, or are several there: out and in as transformers has them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from checkpointing import DamagedError, describe, export, load, save, stream
from checkpointing.__main__ import main
from checkpointing.foreign import describe_foreign
from checkpointing.hub_names import _place, hub_names

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 6, "tie_word_embeddings": True, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_neox": {"tie_word_embeddings": False},
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
    model.save_pretrained(tmp_path / "theirs")
    save(tmp_path / "run", 1, describe(model))
    assert exported(tmp_path / "run", tmp_path / "ours", tmp_path / "theirs") == 0
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert same(ours, theirs) and not theirs.keys() <= model.state_dict().keys()
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
    assert exported(tmp_path / "again", tmp_path / "ours again", tmp_path / "theirs") == 0  # of tied names one is there
    assert same(weights(tmp_path / "ours again"), theirs)
    # The comparison sees two tensors that changed places, such as two experts'.
    shape = next(tensor.shape for name, tensor in theirs.items() if name not in model.state_dict())
    one, other = [name for name, tensor in theirs.items() if tensor.shape == shape][:2]
    theirs[one], theirs[other] = theirs[other], theirs[one]
    assert not same(ours, theirs)


def test_another_models_description_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("mixtral")
    save(tmp_path / "run", 1, describe(model))
    for option, value in (("num_local_experts", 4), ("num_hidden_layers", 3), ("num_hidden_layers", 1)):
        other = copy.deepcopy(model.config)
        setattr(other, option, value)
        other.save_pretrained(tmp_path / "other")
        assert exported(tmp_path / "run", tmp_path / "out", tmp_path / "other") == 2
        assert re.search("the shape of model.* is .* in the checkpoint and .*--config DIR", capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "of my own"}')
    assert exported(tmp_path / "run", tmp_path / "out", tmp_path / "unknown") == 2
    assert "`python -m trainer.methods merge RUN DIR`" in capsys.readouterr().err and not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "theirs")
    found = weights(tmp_path / "theirs")
    name = next(name for name in found if ".experts.0." in name)
    save_file({**found, name: found[name][1:].clone()}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(DamagedError, match=r"is of shape .* by its config\.json"):
        describe_foreign(tmp_path / "theirs")


def test_a_model_that_is_not_known_goes_in_and_out_under_the_names_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Code that comes with a model is not run for it, and nobody is asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    held = {"a.experts.0.w.weight": torch.ones(2, 3), "a.experts.1.w.weight": torch.zeros(2, 3)}
    tmp_path.joinpath("own.py").write_text("raise SystemExit('it was run')")
    code = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    for number, config in enumerate((None, {"model_type": "own", **code}, {"model_type": "mixtral", **code})):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(held, tmp_path / "model.safetensors")
        pieces = describe_foreign(tmp_path).pieces
        assert {p.name for p in pieces if p.name.startswith("model/")} == {f"model/{name}" for name in held}
        assert any("experts are imported one by one, as they lie there" in said for said in caplog.messages)
        caplog.clear()
        save(tmp_path / f"run-{number}", 0, [p for p in pieces if p.name.startswith("model/")])
        if config is not None:
            assert exported(tmp_path / f"run-{number}", tmp_path / f"out-{number}", tmp_path) == 0
            assert same(weights(tmp_path / f"out-{number}"), held)


def test_models_of_other_heads_keep_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their config.json is that of a causal model as well."""
    config = AutoConfig.for_model("llama", **SIZES, num_attention_heads=2, num_labels=3, pad_token_id=0)
    for number, kind in enumerate((AutoModelForSequenceClassification, AutoModel)):
        model = kind.from_config(config)
        model.save_pretrained(tmp_path / f"theirs-{number}")
        save(tmp_path / f"run-{number}", 1, describe(model))
        assert exported(tmp_path / f"run-{number}", tmp_path / f"ours-{number}", tmp_path / f"theirs-{number}") == 0
        assert same(weights(tmp_path / f"ours-{number}"), weights(tmp_path / f"theirs-{number}"))
        assert "under the names that they have here" in caplog.messages[-1]


def test_a_size_that_the_description_has_otherwise_is_imported_as_it_is(tmp_path: Path) -> None:
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    held = weights(tmp_path)
    more = torch.cat([held["lm_head.weight"], torch.ones(3, 16)])
    save_file({**held, "lm_head.weight": more}, tmp_path / "model.safetensors")
    (piece,) = (p for p in describe_foreign(tmp_path).pieces if p.name == "model/lm_head.weight")
    assert piece.global_shape == (100, 16) and torch.equal(piece.tensor, more)


def test_what_is_no_box_of_a_tensor_has_no_place() -> None:
    base = torch.empty(2, 6, 4, device="meta")
    found = _place("a", base, base[1][2:4])
    assert found is not None and (found.box.offset, found.box.size, found.shape) == ((1, 2, 0), (1, 2, 4), (2, 4))
    for other in (base.transpose(1, 2), base[:, ::2], base.view(4, 3, 4)[1:3], base.view(1, 2, 6, 4)):
        assert _place("a", base, other) is None


def test_experts_that_a_directory_has_as_one_tensor_stay_one(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    AutoConfig.for_model("gpt_oss", **SIZES, **heads).save_pretrained(tmp_path)
    names = hub_names(tmp_path)
    assert names.places.keys() == names.shapes.keys()
    assert all(place.shape == names.shapes[name] for name, place in names.places.items())
