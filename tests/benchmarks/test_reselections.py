"""Killed and resumed runs against an undisturbed one, short; and what would be different is found."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import reselections
from benchmarks.reselections import differing, main
from trainer.methods.deltas import Delta
from trainer.methods.entries import Entries


@pytest.mark.usefixtures("processes")
def test_a_killed_run_goes_on_with_the_same_entries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reselections, "LAYOUTS", [(1, []), (2, ["parallel=fsdp"])])
    assert main(["--json", "--steps", "44", "--methods", "spiel"]) == 0
    loss, entries, resumes = json.loads(capsys.readouterr().out)["rows"]
    assert loss["ours"] <= 1e-5 and entries["ours"] == 0 and resumes["ours"] == 1


def test_other_entries_and_values_are_counted() -> None:
    def delta(indices: list[int], values: list[float]) -> Delta:
        return Delta({"w": Entries(torch.tensor(indices), torch.tensor(values), torch.zeros(len(values)))})

    found = differing(delta([1, 2, 5], [1.0, 2.0, 3.0]), delta([1, 3, 5], [1.0, 2.0, 3.5]))
    assert found == {"entries": 2, "values": 0.5, "count": 3}
