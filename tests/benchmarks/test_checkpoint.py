"""The checkpoint benchmark, cut down: both sides end equal, and what it prints keeps its contract."""

from __future__ import annotations

import json

from tests.runs import trainer


def test_a_short_run_prints_one_object_that_is_judged_by_bytes_alone() -> None:
    options = ["--json", "--megabytes", "60", "--rounds", "2", "--ranks", "2"]
    done = trainer(*options, module="benchmarks.checkpoint")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["peer_name"] for row in rows] == ["DCP", "raw files", "DCP", "DCP", None, None, None]
    assert [row["ok"] for row in rows] == [None, None, None, None, True, None, None]
    assert 1.0 <= rows[4]["ours"] <= 1.05
