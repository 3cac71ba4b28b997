"""The main job's benchmark, cut down: it watches a real launch, and what it prints keeps its contract."""

from __future__ import annotations

import json

import pytest

from tests.harness.runs import trainer


@pytest.mark.soak  # the other benchmarks stand in for it in the default run
def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--steps", "3", module="benchmarks.main_job")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["benchmark"] == "main_job"
    rows = {row["name"]: row for row in report["rows"]}
    assert all(row["ok"] is None for row in rows.values())
    first, last = rows["loss of the first step"]["ours"], rows["held-out loss at the end"]["ours"]
    assert 5.0 < last < first < 6.0  # near a uniform guess, ln 256
    assert rows["training time"]["ours"] > 0
