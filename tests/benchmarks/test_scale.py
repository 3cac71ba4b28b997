"""The simulated checkpoint of many writers, and the directory of many generations, cut down."""

from __future__ import annotations

import json

import pytest

from benchmarks.scale import tensors
from tests.harness.runs import trainer


@pytest.mark.usefixtures("processes")
def test_a_short_run_prints_one_object_that_is_not_judged() -> None:
    done = trainer("--json", "--writers", "20", "--generations", "30", module="benchmarks.scale")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["ok"] for row in rows] == [None] * 6 and all(row["ours"] > 0 for row in rows)


def test_the_model_has_its_seventy_billion_parameters() -> None:
    parameters = sum(t.nbytes // 4 for name, t in tensors(1024).items() if name.startswith("model/"))
    assert 70e9 < parameters < 71e9 and len(tensors(1024)) == 3 * 723
