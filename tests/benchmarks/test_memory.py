"""The benchmark of snapshots, cut down: both sides end equal, and what it prints keeps its contract."""

from __future__ import annotations

import json
import os

import pytest

from tests.harness.processes import wait_for
from tests.harness.runs import trainer

pytestmark = pytest.mark.usefixtures("processes")


def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--megabytes", "100", "--pairs", "2", module="benchmarks.memory")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 12 and all(row["ok"] is None for row in rows)
    # CPU seconds are a difference of two sides, which a machine that stalls can turn around.
    assert all(row["ratio"] > 0 for row in rows if not row["name"].startswith("CPU"))
    wait_for(lambda: not any(name.startswith("evershard-benchmark") for name in os.listdir("/dev/shm")), 30)
