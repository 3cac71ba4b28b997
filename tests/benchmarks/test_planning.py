"""The planning benchmark, cut down: what it prints keeps its contract."""

from __future__ import annotations

import json

import pytest

from tests.harness.runs import trainer


@pytest.mark.soak  # the other benchmarks stand in for it in the default run
def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--ranks", "2", "--tensors", "200", "--rounds", "2", module="benchmarks.planning")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"benchmark", "machine", "rows"} and report["benchmark"] == "planning"
    names = [row["name"].rpartition("ranks, ")[2] for row in report["rows"]]
    kinds = ("save, cold", "save, cached", "load, cold", "load, again")
    assert names == [name for kind in kinds for name in (kind, f"{kind}, against DCP")]
    assert all(row["ok"] is None and row["ours"] > 0 for row in report["rows"])
