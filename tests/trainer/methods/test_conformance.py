"""Every method in conf/method does what `conformance.py` asks, and methods that are broken on purpose do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpointing import load
from tests.harness.engines import LAYOUTS, furthest, start
from tests.harness.worlds import SharedWorld
from tests.trainer.methods.conformance import (
    BAR,
    CHAIN,
    LAST,
    METHODS,
    STEPS,
    Trained,
    furthest_merged,
    is_exact,
    is_no_op_at_the_start,
    overhead,
    overrides,
    pieces_named,
    reverts,
    train_alone,
    train_link,
    trainable,
)
from trainer.compose import compose
from trainer.methods.tuned_runs import Tuned
from trainer.options.method import Lora, Reselection, Sparse

SPARSE = [m for m in METHODS if isinstance(compose(overrides(m)).method, Sparse)]
PHASES = [m for m in SPARSE if "promote_rank" in str(overrides(m)) or "every=7" in str(overrides(m))]


@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_the_bases_at_the_start(method: str) -> None:
    assert is_no_op_at_the_start(start(overrides(method)))


@pytest.mark.smoke
@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("method", METHODS)
def test_merged_reverted_and_counted(method: str, tmp_path: Path) -> None:
    trained = Trained.by(method, tmp_path)
    assert furthest_merged(trained) <= (0 if is_exact(method) else 1e-5)
    if not isinstance(trained.started.config.method, Lora):
        assert reverts(trained)
    declared, in_groups, stored = trainable(trained)
    assert declared == in_groups == stored > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_through_every_engine_as_if_it_had_stayed(method: str, tmp_path: Path, world: SharedWorld) -> None:
    """Which of them it starts under, and makes its first selection, is another one for every method."""
    turn = (METHODS.index(method) if method in METHODS else len(Path(method).stem)) % len(CHAIN)
    undisturbed = start(overrides(method)).train(1, LAST)
    before, losses = None, list[float]()
    for number, layout in enumerate([*CHAIN[turn:], *CHAIN[:turn]]):
        after = tmp_path / str(number)
        arguments = (method, layout, before, after, number * STEPS + 1)
        losses += world.run(train_link, LAYOUTS[layout][0], *arguments)[0]
        before = after
    assert furthest(losses, undisturbed) <= BAR, (losses, undisturbed)
    assert furthest(start(["method=full", f"train.steps={LAST}"]).train(1, LAST), undisturbed) > BAR or method == "full"


ENGINES = ["fsdp", "tp", "zero 2", "zero 3", "pp", "fsdp x tp", "accelerate", "pp, interleaved"]


# Every engine for every second method: all of them went through all engines above.
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param(method, layout, marks=[pytest.mark.soak] * ((m + n) % 2))
        for m, method in enumerate(PHASES)
        for n, layout in enumerate(ENGINES)
    ],
)
def test_what_is_selected_by_training_is_the_same_under_every_engine(
    method: str, layout: str, world: SharedWorld
) -> None:
    size, _ = LAYOUTS[layout]
    alone = start(overrides(method)).train(1, 9)
    assert furthest(world.run(train_alone, size, method, layout, 9)[0], alone) <= BAR


# ---- what is broken is found ----


def test_values_that_are_not_zero_are_no_no_op() -> None:
    started = start(overrides("random_sparse"))
    (piece, *_) = pieces_named(started, "sparse_values")
    piece.tensor.data[0] = 0.1
    started.training.publish()
    assert not is_no_op_at_the_start(started)


@pytest.mark.usefixtures("long")
def test_a_value_or_an_original_that_is_off_is_found(tmp_path: Path) -> None:
    trained = Trained.by("random_sparse", tmp_path)
    layer = next(iter(trained.started.training.method._trained.layers.values()))  # type: ignore[attr-defined]
    with torch.no_grad():
        layer.weight.view(-1)[layer.sparse_indices[0].long()] += 0.5
    assert furthest_merged(trained) > 1e-5
    free = next(i for i in range(layer.weight.numel()) if i not in layer.sparse_indices.tolist())
    assert reverts(trained)
    with torch.no_grad():
        layer.weight.view(-1)[free] += 1e-3
    assert not reverts(trained)


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("what", ["moments", "indices", "position"])
def test_state_that_is_lost_or_shifted_is_found(what: str, tmp_path: Path) -> None:
    method = "spiel"
    undisturbed = start(overrides(method)).train(1, 10)
    train_link(method, "single", None, tmp_path, 1)
    started = start(overrides(method))
    load(tmp_path, started.training.pieces_for)
    if what == "moments":
        for piece in pieces_named(started, "/exp_avg") + pieces_named(started, "/exp_avg_sq"):
            piece.tensor.zero_()
    elif what == "indices":
        for piece in pieces_named(started, "sparse_indices"):
            piece.tensor.add_(1)
            piece.tensor[-1] = 0
    else:
        (piece,) = pieces_named(started, "method/position")
        piece.tensor.add_(1)
    started.training.publish()
    assert furthest(started.train(3, 10), undisturbed[2:]) > BAR


def test_a_layer_that_trains_more_than_it_says_is_counted(tmp_path: Path) -> None:
    trained = Trained.by("random_sparse", tmp_path)
    layer = next(iter(trained.started.training.method._trained.layers.values()))  # type: ignore[attr-defined]
    layer.weight.requires_grad_(True)
    declared, in_groups, _ = trainable(trained)
    assert declared != in_groups


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("method", SPARSE)
def test_a_sparse_checkpoint_holds_what_trains_and_little_else(method: str, tmp_path: Path) -> None:
    trained = Trained.by(method, tmp_path)
    assert 1 <= overhead(trained) <= 1.02
    manifest = Tuned.open(tmp_path).manifest
    if compose(overrides(method)).method.schedule is not Reselection.rewind:  # type: ignore[attr-defined]
        assert not any(name.endswith("proj.weight") for name in manifest.tensors)
        assert any(name.endswith("proj.weight") for name in manifest.external)
