"""The loop against an engine that only records: what is asked of it, what is reported, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.harness.runs import SMALL
from trainer import loop
from trainer.compose import compose
from trainer.data.feed import Feed
from trainer.data.sources import load_corpus
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import TrainingFailed
from trainer.evaluation import Evaluation, evaluate
from trainer.loop import RunParts, due, optimize, train
from trainer.options.config import Config
from trainer.progress import LossScale, Progress
from trainer.schedule import learning_rate


class Recorder:
    """An engine whose loss is one nat a target."""

    device = torch.device("cpu")
    world_size, data_rank, data_size = 1, 0, 1

    def __init__(self, *norms: float) -> None:
        self.calls: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.norms = list(norms)
        self.scales: list[float | None] = []

    def accumulate(self, micro_batches: Any, weight: float) -> torch.Tensor:
        self.calls += [{"ids": batch.ids.tolist(), "weight": weight, "key": key} for key, batch in micro_batches]
        return self.loss([batch for _, batch in micro_batches])

    def step(self, lr: float, loss_scale: float | None, before_update: Callable[[], None]) -> torch.Tensor:
        before_update()
        self.rates.append(lr)
        self.scales.append(loss_scale)
        return torch.tensor(self.norms.pop(0) if self.norms else 0.5)

    def loss(self, batches: Any) -> torch.Tensor:
        return torch.stack([(batch.labels >= 0).sum() for batch in batches]).sum().double().reshape(1)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Sinks:
    """A tracker and a saver that remember in which order they were called."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.fences = 0
        self.rows: list[dict[str, Any]] = []

    def step(self, row: dict[str, Any]) -> None:
        self.told.append(("row", row["step"]))
        self.rows.append(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.told.append((f"{prompt}{text}", step))

    def fence(self) -> None:
        self.fences += 1

    def settle(self) -> dict[str, float]:
        self.told.append(("settle", 0))
        return {"blocked_s": 0.25}

    def save(self, done: Progress, metrics: dict[str, float], *, durable: bool, last: bool) -> None:
        assert metrics == {key: self.rows[-1][key] for key in ("loss", "eval_loss") if key in self.rows[-1]}
        self.told.append(("durable save" if durable else "save", done.step))
        assert done.tokens == self.rows[-1]["tokens"] and last == (done.step == 5)

    def finish(self, done: Progress, metrics: dict[str, float]) -> None:
        self.told.append(("finish", done.step))

    def leave(self, done: Progress, metrics: dict[str, float]) -> None:
        self.told.append(("leave", done.step))


@dataclass
class Warned:
    """A warning that comes while this step is computed."""

    during: int = 100
    asked: int = 0

    def is_due(self) -> bool:
        self.asked += 1
        return self.asked > self.during


def configure(*overrides: str) -> tuple[Config, Feed, Any]:
    config = compose([*SMALL, "train.global_batch=6", "train.micro_batch=2", "train.steps=5", *overrides])
    corpus = load_corpus(config.data, ByteTokenizer(), config.train.seq_len)
    feed = Feed(corpus.train, global_batch=6, micro_batch=2, seed=config.train.seed, pad=0, num_ranks=1, rank=0)
    return config, feed, Evaluation(corpus.held_out, config.eval.samples)


def test_what_a_step_asks_of_the_engine() -> None:
    config, feed, evaluation = configure("schedule.warmup_steps=3", "data.log_ids=true")
    engine, sinks = Recorder(), Sinks()
    done = Progress()
    train(RunParts(config, engine, feed, evaluation, sinks, sinks), done, Warned())  # type: ignore[arg-type]
    for step in range(1, 6):
        share, calls = feed.step(step), engine.calls[3 * step - 3 : 3 * step]
        assert all(call["weight"] == 1 / share.num_targets for call in calls)  # by the count of the global batch
        assert (
            [i for call in calls for i in call["ids"]]
            == share.sample_ids.tolist()
            == sinks.rows[step - 1]["sample_ids"]
        )
    assert len({call["key"] for call in engine.calls}) == 15  # random draws of their own for every micro-batch
    assert engine.rates == [learning_rate(s, 5, config.optimizer.lr, config.schedule) for s in range(1, 6)]
    assert all(row["loss"] == 1.0 and row["grad_norm"] == 0.5 for row in sinks.rows)
    assert (done.step, done.tokens) == (5, sinks.rows[-1]["tokens"]) == (5, 5 * 6 * 16)


def test_who_watches_is_told_of_each_step_before_it_and_ends_the_run_by_raising() -> None:
    config, feed, evaluation = configure()
    engine, sinks, seen = Recorder(), Sinks(), list[tuple[int, int]]()

    def watch(step: int) -> None:
        seen.append((step, len(sinks.rows)))
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RunParts(config, engine, feed, evaluation, sinks, sinks), Progress(), Warned(), watch)  # type: ignore[arg-type]
    assert seen == [(1, 0), (2, 1), (3, 2), (4, 3)] and len(engine.rates) == 3


def test_going_on_asks_for_the_same_as_never_stopping() -> None:
    config, feed, evaluation = configure()
    whole, part = Recorder(), Recorder()
    train(RunParts(config, whole, feed, evaluation, *[Sinks()] * 2), Progress(), Warned())  # type: ignore[arg-type]
    train(RunParts(config, part, feed, evaluation, *[Sinks()] * 2), Progress(3, 100), Warned())  # type: ignore[arg-type]
    assert part.calls == whole.calls[9:] and part.rates == whole.rates[3:]
    shifted = Recorder()
    train(RunParts(config, shifted, feed, evaluation, *[Sinks()] * 2), Progress(2, 100), Warned())  # type: ignore[arg-type]
    assert shifted.calls[:6] != part.calls  # the control: a cursor that is off by one is seen


def test_lines_come_before_the_checkpoint_that_counts_them_and_say_what_it_cost() -> None:
    config, feed, evaluation = configure("checkpoint.every=2", "eval.every=3")
    sinks = Sinks()
    train(RunParts(config, Recorder(), feed, evaluation, sinks, sinks), Progress(), Warned())  # type: ignore[arg-type]
    assert sinks.told == [
        *[("settle", 0), ("row", 1), ("save", 1)],
        *[("settle", 0), ("row", 2), ("durable save", 2)],
        *[("settle", 0), ("row", 3), ("save", 3)],
        *[("settle", 0), ("row", 4), ("durable save", 4)],
        *[("settle", 0), ("row", 5), ("durable save", 5)],
        ("finish", 5),
    ]
    assert [row["blocked_s"] for row in sinks.rows] == [0.25] * 5
    assert sinks.fences == 5  # before every update
    assert [row.get("eval_loss") for row in sinks.rows] == [None, None, 1.0, None, 1.0]


class Judged(Sinks):
    """Whose saves say which of them is the last."""

    def save(self, done: Progress, metrics: dict[str, float], *, durable: bool, last: bool) -> None:
        assert durable or not last
        self.told.append(("last save" if last else "save", done.step))


@pytest.mark.usefixtures("long")
def test_text_is_written_after_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    config, feed, evaluation = configure(
        "eval.generate_every=2", "checkpoint.every=0", "eval.every=0", "eval.generate_tokens=3"
    )
    evaluation.held_out = []
    evaluation.write = lambda: ("a", "b")
    sinks = Sinks()
    train(RunParts(config, Recorder(), feed, evaluation, sinks, sinks), Progress(), Warned())  # type: ignore[arg-type]
    shown = [(what, step) for what, step in sinks.told if what in ("ab", "save", "durable save")]
    assert shown[-1] == ("durable save", 5) and [s for what, s in shown if what == "ab"] == [
        2,
        4,
    ]  # the last by the run
    assert shown.index(("ab", 2)) == shown.index(("save", 2)) + 1
    assert not any("eval_loss" in row for row in sinks.rows)


def test_it_ends_where_the_held_out_loss_does_not_get_better_and_stays_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    config, feed, evaluation = configure("eval.every=1", "eval.patience=2", "train.steps=9", "checkpoint.every=0")
    losses = [3.0, 2.0, 2.5, 2.0, 1.0]
    monkeypatch.setattr("trainer.evaluation.evaluate", lambda *_: losses.pop(0))
    sinks, done = Judged(), Progress()
    assert train(RunParts(config, Recorder(), feed, evaluation, sinks, sinks), done, Warned())  # type: ignore[arg-type]
    assert [one for one in sinks.told if "save" in one[0]] == [("save", 1), ("save", 2), ("save", 3), ("last save", 4)]
    assert (done.step, done.best_loss, done.since_best) == (4, 2.0, 2) and sinks.told[-1] == ("finish", 4)
    again = Judged()
    resumed = Progress.of(done.as_state(), scaled=False)
    assert train(RunParts(config, Recorder(), feed, evaluation, again, again), resumed, Warned())  # type: ignore[arg-type]
    assert again.told == [("finish", 4)]
    config.eval.patience = 3  # more patience goes on, and finds a better one
    assert not train(RunParts(config, Recorder(), feed, evaluation, again, again), resumed, Warned(1))  # type: ignore[arg-type]
    assert resumed.step == 5 and resumed.best_loss == 1.0 and resumed.since_best == 0


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_reported_nor_saved(norm: float) -> None:
    config, feed, evaluation = configure("checkpoint.every=1")
    sinks, done = Sinks(), Progress(2, 7)
    with pytest.raises(TrainingFailed, match=r"Step 3 gave .* Lower optimizer\.lr"):
        train(RunParts(config, Recorder(norm), feed, evaluation, sinks, sinks), done, Warned())  # type: ignore[arg-type]
    config.data.log_ids = True
    with pytest.raises(TrainingFailed, match=rf"samples: \[{feed.step(3).sample_ids[0]}, "):
        train(RunParts(config, Recorder(norm), feed, evaluation, sinks, sinks), done, Warned())  # type: ignore[arg-type]
    assert sinks.told == [] and (done.step, done.tokens) == (2, 7)


def test_a_step_that_overflowed_under_a_loss_scale_is_reported_as_left_out() -> None:
    config, feed, evaluation = configure("precision=fp16")
    engine, sinks, done = Recorder(0.5, float("inf"), float("nan")), Sinks(), Progress(0, 0, LossScale(64.0))
    train(RunParts(config, engine, feed, evaluation, sinks, sinks), done, Warned())  # type: ignore[arg-type]
    assert engine.scales == [64.0, 64.0, 32.0, 16.0, 16.0]
    assert [row["loss_scale"] for row in sinks.rows] == engine.scales
    assert [row["grad_norm"] for row in sinks.rows] == [0.5, None, None, 0.5, 0.5]
    weights = [engine.calls[3 * step]["weight"] * feed.step(step + 1).num_targets for step in range(5)]
    assert weights == pytest.approx(engine.scales)
    assert done.loss_scale == LossScale(16.0, 2)


def test_a_loss_scale_does_not_shrink_for_ever() -> None:
    config, feed, evaluation = configure("precision=fp16")
    sinks, done = Sinks(), Progress(0, 0, LossScale(2.0))
    with pytest.raises(TrainingFailed, match=r"Step 2 gave .* gradient norm of None"):
        train(RunParts(config, Recorder(*[float("inf")] * 5), feed, evaluation, sinks, sinks), done, Warned())  # type: ignore[arg-type]


def test_the_held_out_loss_weighs_targets_and_not_samples() -> None:
    class ByLength(Recorder):
        def loss(self, batches: Any) -> torch.Tensor:
            return torch.tensor([sum((batch.labels >= 0).sum().item() * len(batch.ids) for batch in batches)])

    parts = [SimpleNamespace(ids=[0] * n, labels=torch.zeros(n, 2)) for n in (1, 3)]
    share = SimpleNamespace(micro_batches=list(enumerate(parts)), num_targets=8)
    assert evaluate(ByLength(), share) == (1 * 2 + 3 * 6) / 8  # type: ignore[arg-type]


def test_the_loss_of_a_step_is_over_all_its_targets() -> None:
    batch = SimpleNamespace(ids=torch.zeros(1, dtype=torch.long), labels=torch.tensor([[0, -100, 5]]))
    share = SimpleNamespace(micro_batches=[(0, batch)], num_targets=4)  # two of them on another rank
    assert optimize(Recorder(), share, 0.1, 3) == (0.5, 0.5)  # type: ignore[arg-type]


def test_when_something_is_due() -> None:
    assert [s for s in range(1, 8) if due(s, 3, 7)] == [3, 6, 7]
    assert [s for s in range(1, 8) if due(s, 0, 7)] == [7]


def test_a_warning_ends_the_run_after_the_step_that_is_under_way() -> None:
    config, feed, evaluation = configure("eval.every=0")
    sinks, done = Sinks(), Progress()
    assert not train(RunParts(config, Recorder(), feed, evaluation, sinks, sinks), done, Warned(2))  # type: ignore[arg-type]
    assert done.step == 2 and sinks.told[-2:] == [("save", 2), ("leave", 2)]
    # What it has just come from may lie in memory alone; the saver knows.
    sinks = Sinks()
    assert not train(RunParts(config, Recorder(), feed, evaluation, sinks, sinks), done, Warned(0))  # type: ignore[arg-type]
    assert sinks.told == [("leave", 2)]
    # Nothing has been done at all: there is nothing to save.
    sinks = Sinks()
    assert not train(RunParts(config, Recorder(), feed, evaluation, sinks, sinks), Progress(), Warned(0))  # type: ignore[arg-type]
    assert sinks.told == []
    assert train(RunParts(config, Recorder(), feed, evaluation, *[Sinks()] * 2), done, Warned())  # type: ignore[arg-type]


def test_a_sample_that_several_ranks_compute_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under tensor parallelism and in a pipeline; one that is in a batch twice stays twice."""
    told = [[(1, [5, 7])], [(1, [5, 7])], [(0, [5, 9]), (2, [9])], [(0, [5, 9]), (2, [9])]]
    monkeypatch.setattr(loop, "Team", lambda: SimpleNamespace(together=lambda action: told))
    assert loop.consumed_ids(SimpleNamespace(micro_batches=[])) == [5, 9, 5, 7, 9]  # type: ignore[arg-type]
