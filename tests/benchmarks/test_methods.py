"""The benchmark of methods at a small size: every row is there, and the search for weight-like tensors finds some."""

from __future__ import annotations

import json
import socket

import pytest
import torch

from benchmarks.methods import (
    DENSITY,
    SMALL,
    Ours,
    Weightlike,
    batches,
    bytes_of_connections,
    check_gradients,
    main,
    saved_bytes,
)
from trainer.methods.sparse import layer as layers


@pytest.mark.usefixtures("processes")
def test_it_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--small", "--pairs", "4", "--engines", "DDP"]) == 0
    report = json.loads([line for line in capsys.readouterr().out.splitlines() if line.startswith("{")][-1])
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == 12 and all(row["ok"] is None for row in rows.values())
    assert rows["extra bytes saved for the backward"]["ratio"] < 0.05
    assert rows["bytes a step, DDP"]["ratio"] < 2 * DENSITY
    assert rows["tensors like a weight, DDP"]["ours"] == 0


def test_bytes_of_this_process_are_counted_and_nobody_elses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        before = bytes_of_connections()
        with other:
            one.sendall(bytes(10_000))
            assert len(other.recv(10_000, socket.MSG_WAITALL)) == 10_000
            assert bytes_of_connections() - before == 20_000  # both ends are here
        assert bytes_of_connections() - before == pytest.approx(10_000, abs=2)  # and now one of them


def test_a_dense_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control for the search."""
    side = Ours(["method=sparse"], SMALL)
    (batch,) = batches(SMALL, 1)
    shapes = {layer.shape for layer in layers.sparse_layers(side.bare).values()}
    found = []
    for densest in (layers.DENSEST, 0.0):
        monkeypatch.setattr(layers, "DENSEST", densest)
        for layer in layers.sparse_layers(side.bare).values():
            layer.forget()
        with Weightlike(shapes, list(side.bare.parameters())) as watching:
            side.step(batch)
        found.append(len(watching.found))
    assert found[0] == 0 < found[1]


def test_gradients_that_are_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = batches(SMALL, 1)
    check_gradients(SMALL, batch)
    whole = layers.Support.gradient
    monkeypatch.setattr(layers.Support, "gradient", lambda *arguments: whole(*arguments).roll(1))
    with pytest.raises(AssertionError, match="gradients differ"):
        check_gradients(SMALL, batch)


def test_what_a_backward_needs_is_counted_without_the_models_weights() -> None:
    (batch,) = batches(SMALL, 1)
    sparse, full = (saved_bytes(Ours([method], SMALL), batch) for method in ("method=sparse", "method=full"))
    assert 0 < sparse <= full and torch.is_grad_enabled()
