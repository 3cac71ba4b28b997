"""Models as other programs read them: bit-equal, whole or not there, and refused where they are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpointing import External, describe, export, save, stream
from checkpointing.__main__ import main
from tests.harness.models import save_tiny_model


def run_of(tmp_path: Path, kind: str = "llama") -> tuple[Path, Any]:
    """A run directory with one generation, and the model in it, whose weights are those of no file."""
    save_tiny_model(tmp_path / "base", kind)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    run = tmp_path / "run"
    save(run / "checkpoints", 7, describe(model, torch.optim.AdamW(model.parameters())))
    model.config.save_pretrained(run / "hf")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(run / "hf")
    return run, model


def loaded(directory: Path) -> Any:
    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model


def names_in(directory: Path) -> set[str]:
    found: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


def assert_equal(a: Any, b: Any, dtype: torch.dtype = torch.float32) -> None:
    theirs = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        assert theirs[name].dtype == dtype and torch.equal(parameter.to(dtype), theirs[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("file_bytes", [export.FILE_BYTES, 5000])
def test_transformers_loads_the_very_weights(
    kind: str, file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = run_of(tmp_path, kind)
    monkeypatch.setattr(export.export_hugging_face, "__kwdefaults__", {"dtype": None, "file_bytes": file_bytes})
    monkeypatch.setattr(stream, "PART_BYTES", 1000)  # several parts a tensor
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out")]) == 0
    assert "of step 7 in" in capsys.readouterr().out
    found = loaded(tmp_path / "out")
    assert_equal(model, found)
    # Under the very names that transformers writes, for readers that know no other: of tied weights the embedding's.
    model.save_pretrained(tmp_path / "theirs")
    assert names_in(tmp_path / "out") == names_in(tmp_path / "theirs")
    tokens = torch.arange(12)[None]
    assert torch.equal(model.eval()(tokens).logits, found.eval()(tokens).logits)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (file_bytes == 5000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("def f(): pass")["input_ids"]) == "def f(): pass"
    # The control: the base is another.
    with pytest.raises(AssertionError):
        assert_equal(model, loaded(tmp_path / "base"))


def test_buffers_go_with_the_weights(tmp_path: Path) -> None:
    layer = torch.nn.BatchNorm1d(4)
    layer.running_mean.add_(3)
    save(tmp_path / "a", 1, describe(layer))
    assert main(["export", str(tmp_path / "a"), "--to", "torch", str(tmp_path / "new" / "a.pt")]) == 0
    fresh = torch.nn.BatchNorm1d(4)
    fresh.load_state_dict(torch.load(tmp_path / "new" / "a.pt", weights_only=True))
    assert torch.equal(fresh.running_mean, layer.running_mean)


def test_rounded_as_torch_rounds(tmp_path: Path) -> None:
    run, model = run_of(tmp_path)
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), torch.bfloat16)


def test_a_file_of_torch(tmp_path: Path) -> None:
    run, model = run_of(tmp_path)
    assert main(["export", str(run), "--to", "torch", str(tmp_path / "model.pt"), "--json"]) == 0
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert main(["export", str(run), "--to", "torch", str(tmp_path / "model.pt")]) == 2


def test_what_is_there_stays_and_what_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_of(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "out")]) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    before = sorted(tmp_path.iterdir())
    (shard,) = (run / "checkpoints").glob("step-*/shard-*")
    data = bytearray(shard.read_bytes())
    for position in range(len(data) // 3, len(data), 997):
        data[position] ^= 1
    shard.write_bytes(data)
    assert main(["export", str(run), "--to", "hf", str(tmp_path / "other")]) == 1
    assert main(["export", str(run), "--to", "torch", str(tmp_path / "other.pt")]) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_generation_that_does_not_hold_its_base_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = External("model/frozen", torch.float32, (2, 2), "somewhere", "0" * 64)
    layer = torch.nn.Linear(2, 2)
    save(tmp_path / "a", 1, [*describe(layer), frozen])
    assert main(["export", str(tmp_path / "a"), "--to", "hf", str(tmp_path / "out")]) == 2
    assert "holds what was trained, and names the rest by its hash: frozen" in capsys.readouterr().err
    save(tmp_path / "b", 1, describe(layer))
    assert main(["export", str(tmp_path / "b"), "--to", "hf", str(tmp_path / "out")]) == 2
    assert "has no config.json" in capsys.readouterr().err
    save(tmp_path / "c", 1, [])
    assert main(["export", str(tmp_path / "c"), "--to", "torch", str(tmp_path / "out")]) == 2
    assert "holds no model" in capsys.readouterr().err
