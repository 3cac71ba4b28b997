"""The benchmark of daily use, cut down: every side sees the same tokens, asserted by it, and nothing is judged."""

from __future__ import annotations

import json

import pytest

from benchmarks import daily
from tests.harness.runs import trainer


def test_conversations_are_of_functions_and_what_is_said_of_them() -> None:
    found = daily.conversations(5)
    assert len(found) == 5
    for record in found:
        user, assistant = record["messages"]
        assert user["content"].startswith("def ") and assistant["content"]


@pytest.mark.soak  # minutes, for the padded side
def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--records", "30", "--rounds", "2", "--megabytes", "40", module="benchmarks.daily")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(rows) == 9 and all(row["ok"] is None for row in rows)
