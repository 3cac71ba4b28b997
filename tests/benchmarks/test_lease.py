"""The campaign counts what the model says; a short one is `tests/checkpointing/test_lease.py`."""

from __future__ import annotations

import pytest

from benchmarks import lease
from tests.harness import lease_model


@pytest.mark.parametrize("control", ["", "looking without beating"])
def test_a_batch_counts_orders_in_which_two_write(control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BATCH", 200)
    wrong, writes, replaced = lease.batch(control, 0)
    assert (wrong > 0) == bool(control) and writes > 200 and replaced > 20
    variant = lease_model.CONTROLS[control] if control else lease_model.Variant()
    assert wrong == sum(bool(lease_model.run(seed, variant).wrong) for seed in range(200))
