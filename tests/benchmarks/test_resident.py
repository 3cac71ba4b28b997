"""Peak memory of saves and loads, cut down: within the budget at any size."""

from __future__ import annotations

import json

import pytest

from tests.harness.runs import trainer

pytestmark = pytest.mark.usefixtures("processes")


def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--megabytes", "100", module="benchmarks.resident")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 6 and all(row["ok"] is None and row["ours"] < 256 for row in rows)
