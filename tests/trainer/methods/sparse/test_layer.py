"""The custom backward against dense autograd, in float64; what it keeps; what tensor-parallel shares hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from checkpointing import Held
from trainer.methods.sparse import layer as layers
from trainer.methods.sparse.layer import SparseLayer, choose, locate, make_sparse, resize, undo_sparse
from trainer.options.method import Granularity

ROWS, COLUMNS = 6, 7


def linear(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made: Any = nn.Linear(COLUMNS, ROWS) if kind is nn.Linear else Conv1D(ROWS, COLUMNS)
    nn.init.normal_(made.bias)
    return made.to(dtype)


def sparse(kind: type[nn.Module], granularity: Granularity, indices: list[int], dtype: Any = torch.float64) -> Any:
    made = make_sparse(linear(kind, dtype), granularity, len(indices))
    choose(made, torch.tensor(indices))
    made.sparse_values = nn.Parameter(made.sparse_values.detach().to(dtype))
    return made


def dense_gradient(kind: type[nn.Module], x: torch.Tensor) -> torch.Tensor:
    dense = linear(kind, x.dtype)
    (dense(x) ** 2).sum().backward()
    gradient: torch.Tensor = dense.weight.grad
    return gradient


def selected(whole: torch.Tensor, made: SparseLayer) -> torch.Tensor:
    return layers.at(whole, made.sparse_indices, made.granularity)


CASES = [
    (kind, granularity, indices)
    for kind in (nn.Linear, Conv1D)
    for granularity, indices in (
        (Granularity.element, [0, 5, 13, 41]),
        (Granularity.inputs, [1, 4]),
        (Granularity.outputs, [0, 2, 5]),
    )
]


@pytest.mark.parametrize("densest", [0.0, 1.0], ids=["dense product", "at the entries"])
@pytest.mark.parametrize(("kind", "granularity", "indices"), CASES)
def test_gradients_are_those_of_dense_autograd(
    kind: type[nn.Module], granularity: Granularity, indices: list[int], densest: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(layers, "DENSEST", densest)
    made = sparse(kind, granularity, indices)
    x = torch.randn(2, 3, COLUMNS, dtype=torch.float64, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    output = made(x)
    assert torch.allclose(output, linear(kind)(same), rtol=1e-14)
    (output**2).sum().backward()
    (linear(kind)(same) ** 2).sum().backward()
    expected = selected(dense_gradient(kind, same.detach()), made)
    torch.testing.assert_close(made.sparse_values.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-12, atol=1e-12)
    # The control: of the entries next to them it is another one.
    if granularity is Granularity.element:
        shifted = dense_gradient(kind, same.detach()).view(-1)[made.sparse_indices.long().roll(1)]
        assert not torch.allclose(made.sparse_values.grad, shifted)


@pytest.mark.parametrize(("kind", "granularity", "indices"), CASES)
def test_finite_differences_agree(kind: type[nn.Module], granularity: Granularity, indices: list[int]) -> None:
    """Values are in the weight, and moving one moves the loss by its gradient."""
    made = sparse(kind, granularity, indices)
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    (made(x) ** 2).sum().backward()
    gradient = made.sparse_values.grad.reshape(-1)
    at = {
        Granularity.element: lambda: made.weight.data.view(-1)[indices],
        Granularity.inputs: lambda: made.weight.data[:, indices],
        Granularity.outputs: lambda: made.weight.data[indices],
    }
    before = made.weight.detach().clone()
    for number in range(0, gradient.numel(), 3):
        losses = []
        for step in (1e-6, -1e-6):
            moved = at[made.granularity]().clone()
            moved.view(-1)[number] += step
            if made.granularity is Granularity.element:
                made.weight.data.view(-1)[indices] = moved
            elif made.granularity is Granularity.inputs:
                made.weight.data[:, indices] = moved
            else:
                made.weight.data[indices] = moved
            with torch.no_grad():
                losses.append((made(x) ** 2).sum())
            made.weight.data.copy_(before)
        assert float((losses[0] - losses[1]) / 2e-6) == pytest.approx(float(gradient[number]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("kind", "granularity", "indices"), CASES)
def test_shares_of_tensor_parallel_ranks_add_up(
    kind: type[nn.Module], granularity: Granularity, indices: list[int]
) -> None:
    whole = sparse(kind, granularity, indices)
    x = torch.randn(5, COLUMNS, dtype=torch.float64)
    g = torch.randn(5, ROWS, dtype=torch.float64)
    left, right = (x, g) if kind is Conv1D else (g, x)
    support = whole.support
    if whole.granularity is Granularity.outputs:
        expected = support.gradient(left[:, support.rows], right)
    elif whole.granularity is Granularity.inputs:
        expected = support.gradient(left, right[:, support.columns])
    else:
        expected = support.gradient(left, right)
    total = torch.zeros_like(expected)
    size = whole.shape[0]
    for ranges in ([(0, 2), (4, 1)], [(2, 2), (5, size - 5)]):  # query heads and others, as in a fused projection
        part = layers.Support.of(
            whole.sparse_indices, whole.shape, whole.granularity, Held(whole.shape, [ranges, [(0, whole.shape[1])]])
        )
        rows = torch.cat([torch.arange(a, a + n) for a, n in ranges])
        mine = left[:, rows]
        if whole.granularity is Granularity.outputs:
            total += part.gradient(mine[:, part.rows], right)
        elif whole.granularity is Granularity.inputs:
            total += part.gradient(mine, right[:, part.columns])
        else:
            total += part.gradient(mine, right)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def kept_for_the_backward(made: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):  # type: ignore[func-returns-value]
        made(x)
    return kept


def test_only_the_input_is_kept_and_of_columns_only_theirs() -> None:
    x = torch.randn(3, COLUMNS, dtype=torch.float64)
    assert kept_for_the_backward(sparse(nn.Linear, Granularity.element, [1, 2]), x) == [(3, COLUMNS)]
    assert kept_for_the_backward(sparse(nn.Linear, Granularity.inputs, [1, 4]), x) == [(3, 2)]
    assert kept_for_the_backward(sparse(Conv1D, Granularity.inputs, [1, 4]), x) == [(3, 2)]


def test_in_autocast_it_computes_as_the_dense_layer_does() -> None:
    made = make_sparse(linear(nn.Linear, torch.float32), Granularity.element, 3)
    dense = linear(nn.Linear, torch.float32)
    x = torch.randn(4, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.product(x), torch.nn.functional.linear(x, dense.weight))
        made(x).float().sum().backward()
    assert made.sparse_values.grad.dtype is torch.float32


def test_a_layer_becomes_sparse_and_plain_again() -> None:
    made = linear(nn.Linear, torch.float32)
    before, weight = type(made), made.weight
    undo_sparse(make_sparse(made, Granularity.element, 3))
    assert type(made) is before and made.weight is weight and not weight.requires_grad
    assert {name for name, _ in made.named_parameters()} == {"weight", "bias"} and not list(made.buffers())


def test_nothing_selected_and_everything_selected() -> None:
    for count in (0, ROWS * COLUMNS):
        made = sparse(nn.Linear, Granularity.element, list(range(count)))
        x = torch.randn(2, COLUMNS, dtype=torch.float64)
        (made(x) ** 2).sum().backward()
        torch.testing.assert_close(made.sparse_values.grad, dense_gradient(nn.Linear, x).view(-1)[:count])


def test_large_weights_are_indexed_by_more_bits() -> None:
    assert layers.index_dtype((2**16, 2**15 - 1)) is torch.int32
    assert layers.index_dtype((2**16, 2**15)) is torch.int64
    made = make_sparse(linear(nn.Linear), Granularity.element, 2)
    resize(made, 5)
    assert made.sparse_values.shape == made.sparse_indices.shape == (5,)


def test_positions_among_ranges() -> None:
    found = locate(torch.tensor([0, 3, 4, 5, 9]), [(3, 2), (9, 1)])
    assert found.tolist() == [-1, 0, 1, -1, 2]
