"""The universal benchmark, cut down: both sides end equal, nothing is left, and what it prints keeps its contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.runs import trainer


@pytest.mark.soak  # the other benchmarks stand in for it in the default run
def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--megabytes", "50", "--rounds", "2", module="benchmarks.universal")
    assert done.returncode == 0, done.stderr  # which it is not where a loss or a parameter differs
    report = json.loads(done.stdout)
    assert set(report) == {"benchmark", "machine", "rows"} and report["benchmark"] == "universal"
    whole, *others = report["rows"]
    assert whole["bar"] == 1 / 8 and 0 < whole["ours"] < whole["peer"]
    assert all(row["ok"] is None and row["peer_name"] == "DeepSpeed universal" for row in report["rows"])
    assert len(others) == 3 and all(row["bar"] is None for row in others)
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
