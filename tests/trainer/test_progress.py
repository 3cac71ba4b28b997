"""The loss scale of fp16, and what a checkpoint holds of a run's progress."""

from __future__ import annotations

import json

import torch

from trainer.progress import LossScale, Progress


def test_the_scale_moves_as_that_of_torch() -> None:
    ours = LossScale(factor=1024.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=LossScale.GROWTH_STEPS)
    theirs._lazy_init_scale_growth_tracker(torch.device("cpu"))
    overflows, seen = {3, 4, 2500}, set()
    for step in range(7000):
        ours.update(step not in overflows)
        torch._amp_update_scale_(
            theirs._scale, theirs._growth_tracker, torch.tensor(float(step in overflows)), 2.0, 0.5, 2000
        )
        assert (ours.factor, ours.good_steps) == (float(theirs._scale), int(theirs._growth_tracker)), step
        seen.add(ours.factor)
    assert seen == {1024.0, 512.0, 256.0}


def test_progress_comes_back_from_what_was_saved() -> None:
    for done in (Progress(), Progress(3, 400), Progress(3, 400, LossScale(2.0, 7), 1.5, 2)):
        state = json.loads(json.dumps({**done.as_state(), "run_id": "x"}))
        assert Progress.of(state, scaled=done.loss_scale is not None) == done
    assert Progress.of({}, scaled=False) == Progress()
    assert Progress.of(Progress(3, 400).as_state(), scaled=True).loss_scale == LossScale()  # fp16 from here on
    assert Progress.of(Progress(3, 4, LossScale()).as_state(), scaled=False).loss_scale is None


def test_a_loss_that_is_no_number_is_no_better() -> None:
    progress = Progress()
    for loss in (float("nan"), 2.0, float("nan"), float("-inf")):
        progress.evaluated(loss)
    assert (progress.best_loss, progress.since_best) == (2.0, 2)
