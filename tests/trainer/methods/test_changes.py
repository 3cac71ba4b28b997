"""Densities, changes, and the sparsity of a difference."""

from __future__ import annotations

import pytest
import torch

from trainer.methods.changes import as_rows, changes, compare
from trainer.methods.deltas import Delta, LowRank
from trainer.methods.entries import Entries


def test_density_and_change_of_every_weight() -> None:
    entries = Entries(torch.tensor([0, 3]), torch.tensor([0.0, -2.0]), torch.zeros(2))
    nothing = Entries(torch.tensor([], dtype=torch.int64), torch.tensor([]), torch.tensor([]))
    delta = Delta(
        {"a": entries, "none": nothing},
        {"b": LowRank(torch.ones(1, 2), torch.ones(2, 1))},
        {"a": (2, 4), "b": (2, 2), "none": (3,)},
    )
    a, b, none = as_rows(changes(delta))
    assert (a["selected"], a["density"], a["changed"], a["largest"]) == (2, 0.25, 0.125, 2.0)
    assert a["rms"] == pytest.approx(2**0.5) and (b["density"], b["changed"], b["largest"]) == (1.0, 1.0, 1.0)
    assert none["selected"] == 0 and none["largest"] == 0


def test_the_sparsity_of_a_difference() -> None:
    here = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]), "other": torch.ones(2), "shape": torch.ones(3)}
    there = {"w": torch.tensor([1.0, 2.000005, 3.1, 4.0]), "shape": torch.ones(2)}
    (found,) = compare(here.items(), there)
    assert (found["equal"], found["close"]) == (2, 3) and found["largest"] == pytest.approx(0.1, rel=1e-5)
