"""One engine and one method: who is called when, and a model that is built anew on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointing import External, Piece, load, save
from checkpointing.format import Manifest
from tests.harness.engines import Started, feed_for, start, windows
from trainer.compose import compose
from trainer.methods import build
from trainer.methods.method import Backwards, Host, Method, Rebuild, Sizes
from trainer.methods.selection.choosing import Ranks
from trainer.options.config import Config
from trainer.options.method import Full
from trainer.parallel.world import World
from trainer.plan import Topology
from trainer.training import Training, make_training


class Alternating(Method):
    """Trains the head, and from the second step on the last norm: a method of another kind than those that are here."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.calls: list[str] = []
        self.part, self.done = "lm_head", torch.zeros(())
        self.calibrated = False

    def attach(self, model: nn.Module, sizes: Sizes | None = None) -> nn.Module:
        model.requires_grad_(False)
        return model

    @property
    def calibrates(self) -> bool:
        return not self.calibrated

    def begin(self, model: nn.Module, sizes: Sizes | None, everyone: Ranks) -> None:
        self.calls.append("begin")
        self._train(model)

    def _train(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.part))

    def placed(self, host: Host) -> None:
        self.calls.append("placed")

    def left(self) -> None:
        self.calls.append("left")

    def calibrate(self, backwards: Backwards) -> Rebuild | None:
        seen: list[int] = []
        backwards(lambda: seen.append(1))
        backwards(lambda: seen.append(1))
        self.calibrated = True
        self.calls.append(f"calibrated by {len(seen)}")
        return None

    def before(self) -> None:
        self.calls.append("before")

    def after(self, norm: torch.Tensor, loss_scale: float | None) -> Rebuild | None:
        self.done += 1
        self.calls.append("after")
        if self.done != 2:
            return None
        self.part = "model.norm"
        return Rebuild(self._train, restore=lambda: self.calls.append("restored"))

    def pieces(self, held: Sequence[Piece]) -> list[Piece]:
        return [*held, Piece("method/done", self.done, (), ())]

    def shapes(self, manifest: Manifest) -> Sizes | None:
        return {self.part: 1} if f"model/{self.part}.weight" in manifest.tensors else {"other": 1}

    def fits(self, sizes: Sizes | None, *, half_loaded: bool) -> bool:
        return not half_loaded and "other" not in (sizes or {})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    monkeypatch.setattr(Full, "made_by", f"{__name__}:{Alternating.__name__}")
    return start([])


def names(pieces: Sequence[Any], kind: type) -> set[str]:
    return {piece.name for piece in pieces if isinstance(piece, kind) and piece.name.startswith("model/")}


def test_a_method_is_called_in_order_and_may_go_on_with_another_model(started: Started, tmp_path: Path) -> None:
    training, method = started.training, started.training.method
    assert isinstance(method, Alternating)
    assert names(training.pieces(), Piece) == {"model/lm_head.weight"}
    first = training.engine
    losses = started.train(1, 3)
    count = len(started.feed.step(1).micro_batches)
    assert method.calls == [
        *("begin", "placed", f"calibrated by {2 * count}", "before", "after", "before", "after", "left", "placed"),
        *("restored", "before", "after"),
    ]
    assert training.engine is not first and losses[0] != losses[1]
    # What is frozen is in checkpoints by its hash, and that changes with what trains.
    assert names(training.pieces(), Piece) == {"model/model.norm.weight"}
    assert "model/lm_head.weight" in names(training.pieces(), External)
    save(tmp_path, 3, training.pieces())
    method.done.zero_()
    load(tmp_path, training.pieces_for)
    training.publish()
    assert method.done == 3 and training.engine is not first


def test_an_engine_is_made_anew_where_a_generation_does_not_fit(started: Started, tmp_path: Path) -> None:
    training, method = started.training, started.training.method
    assert isinstance(method, Alternating)
    save(tmp_path, 0, training.pieces())
    manifest: list[Manifest] = []
    load(tmp_path, lambda m: manifest.append(m) or training.pieces_for(m))  # type: ignore[func-returns-value]
    engine = training.engine
    training.pieces_for(manifest[0])  # the load before it has not ended with `publish`
    assert training.engine is not engine
    training.publish()
    engine = training.engine
    training.pieces_for(manifest[0])
    assert training.engine is engine


def test_the_fence_comes_before_the_method_writes(started: Started) -> None:
    order: list[str] = []
    training, method = started.training, started.training.method
    after = method.after

    def told(norm: torch.Tensor, loss_scale: float | None) -> Rebuild | None:
        order.append("after")
        return after(norm, loss_scale)

    method.after = told  # type: ignore[method-assign]
    share = started.feed.step(1)
    training.accumulate([(0, share.micro_batches[0][1])], 1.0)
    training.step(0.1, before_update=lambda: order.append("fence"))
    assert order[0] == "fence" and order[-2:] == ["fence", "after"]
    order.clear()  # a step that overflows is left out, and the method is told all the same
    training.accumulate([(0, share.micro_batches[0][1])], float("inf"))
    training.step(0.1, 1.0, before_update=lambda: order.append("fence"))
    assert order == ["fence", "after"]


def test_full_fine_tuning_is_the_method_that_does_nothing() -> None:
    config = compose(["model.num_layers=1"])
    training = make_training(config, build(config), Topology(), World(), torch.device("cpu"))
    assert isinstance(training, Training) and type(training.method) is Method
    feed = feed_for(training, config, windows(config.train.seq_len))
    share = feed.step(1)
    training.accumulate(list(share.micro_batches), 1 / share.num_targets)
    assert float(training.step(0.1)) > 0
    assert not [one for one in training.pieces() if isinstance(one, External)]


def test_what_full_fine_tuning_finds_frozen_is_in_the_checkpoint() -> None:
    """As buffers that a model has as parameters: an export needs them."""
    config = compose(["model.num_layers=1"])
    model = build(config)
    model.model.norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    training = make_training(config, model, Topology(), World(), torch.device("cpu"))
    assert "model/model.norm.weight" in names(training.pieces(), Piece) and not names(training.pieces(), External)
