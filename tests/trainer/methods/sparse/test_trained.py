"""What is known of the layers that a rank computes: whole entries and moments on all ranks, and the base again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.engines import LAYOUTS, start
from tests.harness.worlds import SharedWorld
from tests.trainer.methods.conformance import base_model, overrides
from trainer.methods.sparse.trained import Known


def gathered(layout: str) -> tuple[dict[str, list[list[float]]], bool]:
    """Entries and moments of every layer of this rank's stage after some steps; whether reverting gives the base."""
    started = start([*overrides("lift"), *LAYOUTS[layout][1]])
    started.train(1, 6)
    trained: Any = started.training.method._trained  # type: ignore[attr-defined]
    values, found = trained.values(), {}
    for name in trained.layers:
        entries, moments = values.gathered(name)
        found[name] = [entries.indices.tolist(), entries.values.tolist(), *(m.tolist() for m in moments.values())]
    trained.revert()
    base = dict(base_model(started.config).named_parameters())
    reverted = all(
        torch.equal(piece.tensor, base[f"{name}.weight"].detach()[piece.box.slices((0, 0))])
        for name, pieces in trained.weights().items()
        for piece in pieces
    )
    return found, reverted


@pytest.mark.parametrize("layout", ["fsdp x tp", "zero 3", "pp"])
def test_all_ranks_of_a_layer_gather_the_same(layout: str, world: SharedWorld) -> None:
    alone, _ = gathered("single")
    size, _ = LAYOUTS[layout]
    names: set[str] = set()
    for found, reverted in world.run(gathered, size, layout):
        assert reverted
        names |= found.keys()
        for name, (indices, *rest) in found.items():
            assert indices == alone[name][0], name
            for here, there in zip(rest, alone[name][1:], strict=True):
                torch.testing.assert_close(torch.tensor(here), torch.tensor(there), rtol=1e-3, atol=1e-6)
    assert names == alone.keys()


def test_room_is_made_for_what_a_checkpoint_holds() -> None:
    trained: Any = start(overrides("lift")).training.method._trained  # type: ignore[attr-defined]
    name = next(iter(trained.states))
    trained.make_room(f"method/{name}/settled_values", 7)
    assert trained.tensors()[f"method/{name}/settled_values"].shape == (7,)
    assert trained.tensors()[f"method/{name}/settled_indices"].shape == (0,)


def test_sizes_are_of_all_layers_of_the_model() -> None:
    started: Any = start(overrides("random_sparse"))
    known = Known.of(started.training.engine._bare, started.config.method)
    assert known.sizes == started.training.method._trained.sizes and len(known.shapes) == 35
