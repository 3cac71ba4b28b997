"""A machine that is slow is given longer, and one that is quick no less."""

from __future__ import annotations

import statistics

import pytest

from tests.harness import speed


def test_who_is_slow_has_as_much_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SPIN_S", statistics.median(speed.spin() for _ in range(5)) / 3)
    assert 1.5 < speed.slowness() < 6
    monkeypatch.setattr(speed, "SPIN_S", 10.0)
    assert speed.slowness() == 1.0
