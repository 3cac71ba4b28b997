"""A short version of the campaign, and that it would see what it looks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kills import differences, memory_of, run_undisturbed, run_with_kills
from tests.harness.processes import wait_for
from tests.harness.runs import rows

pytestmark = pytest.mark.usefixtures("processes")

POINTS = ["inside the optimizer", "mid-copy", "between prepare and commit"]


def test_killed_at_every_moment_it_is_the_undisturbed_run_and_leaves_no_memory(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kills = run_with_kills(killed, len(POINTS), points=POINTS)
    assert [(kill.point, kill.tier) for kill in kills] == [(point, "memory") for point in POINTS]
    assert all(kill.lost <= 1 for kill in kills)
    run_undisturbed(whole, len(POINTS))
    assert differences(killed, whole) == []
    memory = memory_of(killed, whole)
    wait_for(lambda: not any(path.exists() for path in memory), 30)
    # The comparison sees a loss in its last digit, and a final state that is another.
    lines = rows(killed)
    lines[5]["loss"] *= 1 + 1e-15
    (killed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(killed, whole) == ["loss"]
    for path in (killed / "checkpoints").glob("step-*16-*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert any(name.startswith("optim/") for name in differences(killed, whole))
