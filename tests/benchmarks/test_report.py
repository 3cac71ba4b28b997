"""Rows and verdicts of benchmarks."""

from __future__ import annotations

import json

import pytest

from benchmarks.report import absolute, compared, finish


def test_the_ratio_is_of_pairs_and_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    good = compared("a", "s", [1.0, 2.2, 9.0], [1.0, 2.0, 3.0], "peer", bar=1.2)  # the machine slows down
    bad = compared("b", "s", [2.0, 2.0, 2.0], [1.0, 1.0, 1.0], "peer", bar=1.2)
    short = compared("c", "s", [2.0, 2.0, 2.0], [1.0, 1.0, 1.0], "peer", bar=1.2, full=False)
    assert (good.ratio, good.ok, bad.ok, short.ok) == (1.1, True, False, None)
    assert finish("x", [good, short], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["ratio"] == 1.1
    assert finish("x", [good, bad], as_json=False) == 1
    assert "NOT REACHED" in capsys.readouterr().out


def test_a_figure_without_a_bar_is_told_and_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish("x", [compared("a", "s", [5.0, 5.0], [1.0, 1.0], "peer", bar=None)], as_json=True) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (row,) = json.loads(capsys.readouterr().out, parse_constant=refuse)["rows"]
    assert (row["ratio"], row["bar"], row["ok"]) == (5.0, None, None)


def test_absolute_bars_go_both_ways() -> None:
    assert absolute("a", "s", 5, better="lower", bar=6).ok
    assert not absolute("a", "s", 5, better="higher", bar=6).ok
