"""What is measured of a model between steps, and a model that cannot write."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import evaluation
from trainer.errors import TrainingFailed
from trainer.evaluation import Evaluation, TextWriter


def test_every_set_has_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "evaluate", lambda engine, share: share)
    feed: Any = SimpleNamespace(evenly=lambda dataset, samples: dataset[0] * samples)
    sets: Any = {"code": [2.0], "chat": [3.0]}
    found = Evaluation([1.0], 2, sets).measure(None, feed)  # type: ignore[arg-type]
    assert found == {"eval_loss": 2.0, "eval_perplexity": math.exp(2), "eval_loss/code": 4.0, "eval_loss/chat": 6.0}
    assert Evaluation([], 2).measure(None, feed) == {}  # type: ignore[arg-type]
    assert Evaluation([1e4], 2).measure(None, feed)["eval_perplexity"] < math.inf  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_is_said_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.evaluation.evaluate", lambda engine, share: share)
    feed: Any = SimpleNamespace(evenly=lambda dataset, samples: dataset)
    held_out: Any = NoNumber("nan")
    found = Evaluation(held_out, 0, {"b": held_out}).measure(None, feed)  # type: ignore[arg-type]
    assert all(map(math.isnan, found.values())) and set(found) == {"eval_loss", "eval_perplexity", "eval_loss/b"}
    assert "eval_loss, eval_perplexity, eval_loss/b: the held-out loss is no number" in caplog.text


class NoNumber(float):
    def __len__(self) -> int:
        return 1


def test_a_model_that_cannot_write_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(evaluation, "sample_text", lambda *_: ("a", "b"))
    engine: Any = SimpleNamespace(data_rank=0)
    writer: Any = TextWriter(engine, None, None, 5, 0, 9)  # type: ignore[arg-type]
    shown = Evaluation([], 0, {}, writer)  # type: ignore[arg-type]
    assert shown.write() == ("a", "b") == writer.last
    monkeypatch.setattr(evaluation, "sample_text", lambda *_: 1 / 0)
    assert shown.write() is None is shown.write() and caplog.text.count("no text can be sampled") == 1
    assert Evaluation([], 0).write() is None  # type: ignore[arg-type]


def test_where_some_ranks_cannot_write_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sample_text", lambda *_: ("a", "b"))
    others = SimpleNamespace(together=lambda say: [say(), "MemoryError: "], rank=0)
    monkeypatch.setattr(evaluation, "Team", lambda: others)
    writer: Any = TextWriter(None, None, None, 5, 0, 9)  # type: ignore[arg-type]
    with pytest.raises(TrainingFailed, match=r"not on \[1\]: MemoryError"):
        writer.write()
