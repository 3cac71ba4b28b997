"""Hugging Face directories, imported: the very weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpointing import DamagedError, LayoutError, describe, load, save
from checkpointing.foreign import describe_foreign
from tests.harness.models import save_tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_an_import_holds_the_weights(kind: str, form: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "whole", kind)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    if form == "shards":
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    elif form == "bin":  # as older releases wrote it
        (tmp_path / "model").mkdir()
        torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
        with pytest.raises(LayoutError, match="type --trust-pickle"):
            describe_foreign(tmp_path / "model")
    else:
        (tmp_path / "whole").rename(tmp_path / "model")
    foreign = describe_foreign(tmp_path / "model", trust_pickle=form == "bin")
    assert foreign.step is None and not foreign.has_optimizer and ("files" in foreign.kind) == (form == "shards")
    save(tmp_path / "ours", 0, foreign.pieces)
    fresh: Any = AutoModelForCausalLM.from_config(model.config)
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))
    # Tied weights lie there under one name, and fill both.
    load(tmp_path / "ours", describe(fresh))
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(fresh.named_parameters())[name], parameter), name


def test_a_checkpoint_of_its_trainer_has_a_step(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 40}))
    torch.save({}, tmp_path / "optimizer.pt")
    foreign = describe_foreign(tmp_path)
    assert (foreign.step, foreign.left_out) == (40, ["optimizer.pt"])


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
        describe_foreign(tmp_path)
    file.unlink()
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(DamagedError, match="is no JSON"):
        describe_foreign(tmp_path)
    torch.save([1], tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(DamagedError, match="is no state dict"):
        describe_foreign(tmp_path, trust_pickle=True)
