"""The overhead benchmark, cut down: both sides end equal, and what it prints keeps its contract."""

from __future__ import annotations

import json

import pytest

from tests.harness.runs import trainer


@pytest.mark.soak  # the other benchmarks stand in for it in the default run
def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--steps", "3", module="benchmarks.overhead")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"benchmark", "machine", "rows"} and report["benchmark"] == "overhead"
    keys = {"name", "unit", "ours", "peer", "peer_name", "ratio", "better", "bar", "ok"}
    assert len(report["rows"]) == 2 and all(keys <= set(row) and row["ok"] is None for row in report["rows"])
