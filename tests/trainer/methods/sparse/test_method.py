"""Runs with sparse values: bf16 weights, phases that change what trains, checkpoints of other sizes, other bases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import External, MismatchError, Piece, load
from tests.harness.engines import LAYOUTS, furthest, start, training_here
from tests.harness.runs import train
from tests.harness.worlds import SharedWorld
from tests.trainer.methods.conformance import base_model, overrides, save_to
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods.tuned_runs import Tuned


@pytest.mark.usefixtures("long")
def test_entries_that_do_not_train_are_untouched_after_a_thousand_steps_in_bf16() -> None:
    small = ["model.num_layers=1", "train.seq_len=4", "train.global_batch=2", "precision=bf16"]
    started: Any = start([*overrides("random_sparse"), "method.bf16_weights=true", *small, "train.steps=1000"])
    layers = started.training.method._trained.layers
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    assert all(weight.dtype is torch.bfloat16 for weight in before.values())
    started.train(1, 1000)
    for name, layer in layers.items():
        free = torch.ones(layer.weight.numel(), dtype=torch.bool)
        free[layer.sparse_indices.long()] = False
        after = layer.weight.detach().view(-1)
        assert torch.equal(after[free].view(torch.int16), before[name].view(-1)[free].view(torch.int16))
        assert layer.sparse_values.abs().gt(0).all() and layer.sparse_values.dtype is torch.float32
        merged = (layer.sparse_originals.float() + layer.sparse_values).to(torch.bfloat16)
        assert torch.equal(after[layer.sparse_indices.long()], merged)
    started.training.method._trained.revert()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())


def train_in_bf16(layout: str) -> list[float]:
    return start([*overrides("spiel"), "method.bf16_weights=true", *LAYOUTS[layout][1]]).train(1, 7)


@pytest.mark.parametrize("layout", ["fsdp", "tp", "zero 3", "zero 1"])
def test_frozen_weights_in_bf16_under_every_kind_of_shard(layout: str, world: SharedWorld) -> None:
    alone = train_in_bf16("single")
    assert furthest(world.run(train_in_bf16, 2, layout)[0], alone) < 1e-5
    assert furthest(start(overrides("spiel")).train(1, 7), alone) > 1e-7  # the base was rounded


def go_on(method: str, before: Path, first: int, last: int) -> list[float]:
    started = start([*overrides(method), "parallel=fsdp"])
    load(before, started.training.pieces_for)
    started.training.publish()
    return started.train(first, last)


@pytest.mark.parametrize("method", ["lt_sft", "sara", "lift", "spt"])
@pytest.mark.parametrize("at", [3, 7, 8])
def test_a_checkpoint_of_either_phase_goes_on(method: str, at: int, tmp_path: Path, world: SharedWorld) -> None:
    """Phases change at step 7, and what was made for a run from scratch has other sizes."""
    undisturbed = start(overrides(method)).train(1, 10)
    started = start(overrides(method))
    started.train(1, at)
    save_to(tmp_path, started, at)
    found = world.run(go_on, 2, method, tmp_path, at + 1, 10)
    assert furthest(found[0], undisturbed[at:]) < 1e-5


@pytest.mark.usefixtures("long")
def test_an_engine_made_for_a_checkpoint_has_the_base_before_and_goes_on_after(tmp_path: Path) -> None:
    """As a run that resumes makes it: of the checkpoint's sizes, without a selection of its own."""
    undisturbed = start(overrides("spiel")).train(1, 8)
    started: Any = start(overrides("spiel"))
    started.train(1, 3)
    save_to(tmp_path, started, 3)
    config, sizes = started.config, started.training.method._trained.sizes
    training: Any = training_here(config, sizes=sizes)
    manifest = Tuned.open(tmp_path).manifest
    training.pieces_for(manifest)
    base = dict(base_model(config).named_parameters())
    for name, layer in training.method._trained.layers.items():
        assert torch.equal(layer.weight, base[f"{name}.weight"]), name
    load(tmp_path, training.pieces_for)
    training.publish()
    again = replace(started, training=training).train(4, 8)
    assert furthest(again, undisturbed[3:]) == 0


@pytest.mark.usefixtures("long")
def test_loading_into_an_engine_that_has_trained_starts_from_the_base(tmp_path: Path) -> None:
    started: Any = start(overrides("lift"))
    started.train(1, 3)
    save_to(tmp_path, started, 3)
    onward = started.train(4, 8)
    load(tmp_path, started.training.pieces_for)
    started.training.publish()
    assert started.train(4, 8) == onward
    # The control: what it had trained would be in the weights.
    load(tmp_path, started.training.pieces_for)
    started.training.method._trained.layers[next(iter(started.training.method._trained.layers))].weight.data.view(-1)[
        :50
    ] += 0.1
    started.training.publish()
    assert started.train(4, 8) != onward


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("half", [True, False])
def test_a_load_that_gave_up_half_way_is_tried_again_from_the_base(half: bool, tmp_path: Path) -> None:
    """As after a damaged generation, of which some originals have been read."""
    started: Any = start(overrides("spiel"))
    started.train(1, 3)
    save_to(tmp_path, started, 3)
    onward = started.train(4, 8)
    started.training.pieces_for(Tuned.open(tmp_path).manifest)
    if half:
        for layer in started.training.method._trained.layers.values():
            layer.sparse_originals.add_(1.0)
            layer.sparse_values.data.fill_(2.0)
    load(tmp_path, started.training.pieces_for)
    started.training.publish()
    assert started.train(4, 8) == onward


def test_the_base_is_external_and_another_one_is_refused(tmp_path: Path) -> None:
    started = start(overrides("random_sparse"))
    started.train(1, 2)
    save_to(tmp_path, started, 2)
    pieces = started.training.pieces()
    base = {name for name, _ in base_model(started.config).named_parameters()}
    assert {one.name for one in pieces if isinstance(one, External)} == {f"model/{name}" for name in base}
    assert not {p.name for p in pieces if isinstance(p, Piece)} & {f"model/{name}" for name in base}
    other = start(overrides("random_sparse"), seed=1)
    with pytest.raises(MismatchError, match="is not what the checkpoint was saved with"):
        load(tmp_path, other.training.pieces_for)


def test_values_decay_towards_the_base_and_are_clipped() -> None:
    """A rate of zero on the gradient's part leaves decay alone: what is large shrinks."""
    started: Any = start([*overrides("random_sparse"), "optimizer.weight_decay=0.5", "optimizer.eps=1e30"])
    layer = next(iter(started.training.method._trained.layers.values()))
    with torch.no_grad():
        layer.sparse_values.fill_(1.0)
    started.train(1, 1)
    assert layer.sparse_values.detach().allclose(torch.tensor(1 - 1e-3 * 0.5))
    norm = float(started.training.engine.step(0.0))
    assert norm == 0.0
    clipped: Any = start([*overrides("random_sparse"), "optimizer.clip=1e-6"])
    share = clipped.feed.step(1)
    clipped.training.accumulate(share.micro_batches, 1 / share.num_targets)
    whole = torch.cat([one.sparse_values.grad for one in clipped.training.method._trained.layers.values()]).norm()
    assert float(clipped.training.step(1e-3)) == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.usefixtures("long")
def test_activation_checkpointing_and_parts_of_micro_batches_change_nothing() -> None:
    plain = start(overrides("lift")).train(1, 6)
    again = start([*overrides("lift"), "parallel.activation_checkpointing=true", "parallel.local_batch=1"]).train(1, 6)
    assert furthest(again, plain) < 1e-6
    spiel = start(overrides("spiel")).train(1, 8)
    assert furthest(start([*overrides("spiel"), "parallel.activation_checkpointing=true"]).train(1, 8), spiel) < 1e-6


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("method", ["spiel", "s2ft"])
def test_compiled_layers_compute_the_same(method: str) -> None:
    plain = start(overrides(method)).train(1, 8)
    compiled = start([*overrides(method), "parallel.compile=true", "parallel.compile_backend=aot_eager"])
    assert furthest(compiled.train(1, 8), plain) < 1e-5


def test_what_was_selected_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    start(overrides("spiel")).train(1, 5)
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said[0] == "selected   step 0: 1,390 entries of 35 weights; 0 others within 1e-6 of the last one chosen"
    assert said[1].startswith("selected   step 5: 1,390 of 1,390 entries are new; ")


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("steps", [4, 7])
def test_a_run_goes_on_from_its_directory_in_either_phase(steps: int, tmp_path: Path) -> None:
    common = [
        "method=lt_sft",
        "method.every=6",
        "tracking=none",
        "train.seq_len=8",
        "train.global_batch=2",
        "eval.every=0",
    ]
    common += ["eval.samples=2", "eval.generate_tokens=0", "schedule=constant", "schedule.warmup_steps=0"]
    train([*common, "train.steps=9", f"run.dir={tmp_path / 'whole'}"])
    for last in (steps, 9):
        train([*common, f"train.steps={last}", f"run.dir={tmp_path / 'twice'}"])
    whole, twice = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "twice")
    )
    assert furthest(whole, twice) < 1e-6


@pytest.mark.parametrize("method", ["spiel", "spt", "sara", "lt_sft"])
def test_what_fp16_would_make_of_gradients_is_refused(method: str) -> None:
    with pytest.raises(Refused, match=r"Type precision=bf16"):
        compose([f"method={method}", "precision=fp16"])
    assert compose(["method=lift", "precision=fp16"]).method
