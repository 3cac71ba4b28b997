"""The benchmark of engines: a short run of one, whose losses it asserts equal itself."""

from __future__ import annotations

import pytest

from benchmarks.engines import BY_HAND, ENGINES, run


@pytest.mark.soak  # the other benchmarks stand in for it in the default run
def test_a_short_run_has_both_figures_and_judges_neither() -> None:
    step, memory = run("TP", 2, full=False)
    assert step.peer_name == memory.peer_name == "TP by hand"
    assert step.ours > 0 and memory.ours > 1 and step.ok is None and memory.ok is None


def test_every_engine_has_a_peer() -> None:
    assert BY_HAND.keys() == ENGINES.keys()
