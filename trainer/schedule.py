"""Learning-rate schedules: pure functions of the step and the total."""

from __future__ import annotations

from math import cos, pi

from trainer.config import Curve, Schedule


def learning_rate(step: int, total: int, peak: float, schedule: Schedule) -> float:
    """The rate of step `step` (counted from 1) of `total`: a linear warm-up, then the curve down to `final`."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    # From 1 just after the warm-up to 0 at the last step.
    left = (total - step) / max(1, total - schedule.warmup_steps)
    if schedule.curve is Curve.constant:
        return peak
    shape = left if schedule.curve is Curve.linear else (1 - cos(pi * left)) / 2
    return peak * (schedule.final + (1 - schedule.final) * shape)
