"""The demonstrations against DCP: they run to their end, whatever they find, and what is printed keeps its contract."""

from __future__ import annotations

import json

import pytest

from tests.harness.runs import trainer

pytestmark = pytest.mark.usefixtures("processes")


def test_the_demonstrations_against_dcp_run_to_their_end() -> None:
    done = trainer("--json", "--peer", "DCP", "--ranks", "2", module="benchmarks.peer_defects")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"benchmark", "machine", "rows"} and report["benchmark"] == "peer_defects"
    assert [row["name"] for row in report["rows"]] == [
        "W-fold reads",
        "metadata that executes",
        "a flipped bit that loads",
        "a torn overwrite that mixes steps",
    ]
    for row in report["rows"]:
        assert set(row) == {"name", "peer", "observed", "shown"} and row["peer"] == "DCP"
        assert row["shown"] in (True, False), row["observed"]
