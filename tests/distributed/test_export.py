"""A model that several ranks share is exported as its engine gathers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from checkpointing import save
from checkpointing.__main__ import main
from tests.harness.engines import feed_for, training_here
from tests.harness.models import save_tiny_model
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_torch_engine import dataset, whole
from trainer.compose import compose
from trainer.loop import optimize


def train_and_save(overrides: list[str], directory: Path) -> dict[str, Any]:
    """This rank's parts of the model, and what the engine says of a text."""
    config = compose(["train.seq_len=12", *overrides])
    engine = training_here(config)
    feed = feed_for(engine, config, dataset())
    for step in (1, 2):
        optimize(engine, feed.step(step), 1e-2, key=step)
    pieces = engine.pieces()
    save(directory, 2, pieces)
    parts = [
        (p.name, p.offset, p.global_shape, p.tensor.detach().clone().numpy())
        for p in pieces
        if hasattr(p, "tensor") and p.name.startswith("model/")
    ]
    return {"parts": parts, "logits": engine.next_logits(torch.arange(9)[None]).float().numpy()}


def test_under_sharding_and_tensor_parallelism_transformers_gets_the_engines_weights(
    tmp_path: Path, world: SharedWorld
) -> None:
    save_tiny_model(tmp_path / "base")
    layout = ["model=hf", f"model.path={tmp_path / 'base'}", "parallel.dp_shard=2", "parallel.tp=2"]
    found = world.run(train_and_save, 4, layout, tmp_path / "checkpoints")
    out, base = tmp_path / "out", str(tmp_path / "base")
    assert main(["export", str(tmp_path / "checkpoints"), "--to", "hf", str(out), "--config", base]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    gathered = whole(found)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), gathered[f"model/{name}"]), name
    with torch.no_grad():
        logits = model.eval()(torch.arange(9)[None]).logits[:, -1].numpy()
    np.testing.assert_allclose(logits, found[0]["logits"], rtol=1e-5, atol=1e-6)
    text = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 9)
    # The control: they are not what was there before.
    before: Any = AutoModelForCausalLM.from_pretrained(base)
    assert not np.array_equal(before.lm_head.weight.detach().numpy(), gathered["model/model.embed_tokens.weight"])
