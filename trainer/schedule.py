"""Learning-rate schedules: pure functions of the step and the total."""

from __future__ import annotations

from math import cos, pi

from trainer.options.schedule import Curve, Schedule


def never_reached(total: int, peak: float, schedule: Schedule) -> str:
    """A note on a run that ends within its warm-up, or whose rate is 0; empty for others."""
    if peak == 0:
        return "optimizer.lr=0: nothing is learned, as in a trial of everything else"
    if schedule.warmup_steps <= total:
        return ""
    return (
        f"the warm-up takes {schedule.warmup_steps} steps and the run {total}: the rate ends at "
        f"{learning_rate(total, total, peak, schedule):.2e} and never comes to optimizer.lr={peak:.2e}. Type "
        f"schedule.warmup_steps={max(total // 20, 0)}"
    )


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
