"""Learning rates: pure, warmed up, and ending where they should."""

from __future__ import annotations

import pytest

from trainer.options.schedule import Curve, Schedule
from trainer.schedule import learning_rate, never_reached


@pytest.mark.parametrize("curve", list(Curve))
def test_warm_up_peak_and_end(curve: Curve) -> None:
    schedule = Schedule(curve=curve, warmup_steps=10, final=0.1)
    rates = [learning_rate(step, 100, 2.0, schedule) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(2.0 if curve is Curve.constant else 0.2)
    halfway = {Curve.constant: 2.0, Curve.linear: 1.1, Curve.cosine: 1.1}
    assert rates[54] == pytest.approx(halfway[curve])


def test_shapes_differ_between_their_ends() -> None:
    linear, cosine = (learning_rate(30, 100, 1.0, Schedule(c, 10, 0.0)) for c in (Curve.linear, Curve.cosine))
    assert linear == pytest.approx(70 / 90) and cosine > linear


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (5, 5), (3, 50)])
def test_short_runs(steps: int, warmup: int) -> None:
    rates = [learning_rate(s, steps, 1.0, Schedule(warmup_steps=warmup)) for s in range(1, steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)


def test_a_rate_that_is_never_reached_is_said() -> None:
    assert never_reached(5, 1.0, Schedule(warmup_steps=5)) == never_reached(9, 1.0, Schedule(warmup_steps=0)) == ""
    said = never_reached(40, 2e-3, Schedule(warmup_steps=100))
    assert "takes 100 steps and the run 40" in said and "ends at 8.00e-04" in said
    assert never_reached(9, 0.0, Schedule(warmup_steps=0)).startswith("optimizer.lr=0: nothing is learned")
    assert said.endswith("never comes to optimizer.lr=2.00e-03. Type schedule.warmup_steps=2")
