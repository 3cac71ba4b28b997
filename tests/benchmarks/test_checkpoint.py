"""The checkpoint benchmark, cut down: both sides end equal, and what it prints keeps its contract."""

from __future__ import annotations

import json

import pytest

from tests.harness.runs import trainer


@pytest.mark.soak  # the other benchmarks stand in for it in the default run
def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    options = ["--json", "--megabytes", "60", "--rounds", "2", "--ranks", "2", "--parts", "layouts", "resident"]
    done = trainer(*options, module="benchmarks.checkpoint")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["peer_name"] for row in rows[:4]] == ["DCP", "raw files", "DCP", "DCP"]
    assert len(rows) == 10 and all(row["ok"] is None for row in rows)
