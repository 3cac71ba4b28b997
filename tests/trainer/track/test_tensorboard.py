"""TensorBoard's curves show every step once, also after a run went back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.track.tensorboard import TensorBoard


def write(directory: Path, done: int, *steps: int, loss: float) -> None:
    tracker = TensorBoard(directory, done)
    for step in steps:
        tracker.step({"step": step, "loss": loss + step, "sample_ids": [1, 2], "grad_norm": None})
    tracker.close(0)


def curve(directory: Path) -> list[tuple[int, float]]:
    found = EventAccumulator(str(directory)).Reload()
    assert found.Tags()["scalars"] == ["loss"]
    return [(event.step, event.value) for event in found.Scalars("loss")]


def test_steps_that_are_computed_again_are_shown_once(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3, 4, loss=100)
    assert curve(tmp_path) == [(1, 101), (2, 102), (3, 103), (4, 104)]
    write(tmp_path, 2, 3, 4, 5, loss=200)  # it went back to step 2
    assert curve(tmp_path) == [(1, 101), (2, 102), (3, 203), (4, 204), (5, 205)]


def test_without_tensorboard_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, 0, 1, loss=1)
    assert "TensorBoard failed and is off" in caplog.text
