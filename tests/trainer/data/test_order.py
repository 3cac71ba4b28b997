"""The order of samples: each once an epoch, a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import permute, samples_of_step, steps_of
from trainer.options.data import Order


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_of_a_huge_range_touches_only_what_is_asked() -> None:
    size = 10**12
    found = permute(np.array([0, 1, size - 1]), size, 3)
    assert len(set(found.tolist())) == 3 and (found >= 0).all() and (found < size).all()


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 100))
def test_each_sample_is_consumed_once_an_epoch(size: int, global_batch: int, seed: int) -> None:
    steps = -(-3 * size // global_batch)
    stream = np.concatenate(
        [samples_of_step(s, seed=seed, dataset_size=size, global_batch=global_batch) for s in range(1, steps + 1)]
    )
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_the_batch_size_only_groups_the_same_stream() -> None:
    small = [samples_of_step(s, seed=5, dataset_size=37, global_batch=4) for s in range(1, 31)]
    large = [samples_of_step(s, seed=5, dataset_size=37, global_batch=12) for s in range(1, 11)]
    assert np.array_equal(np.concatenate(small), np.concatenate(large))


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return samples_of_step(number + 1, seed=seed, dataset_size=500, global_batch=500).tolist()

    orders = [epoch(seed, number) for seed in range(3) for number in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[i + 1 :])


def test_orders_are_stable_across_releases() -> None:
    # Saved runs depend on this order: a change would make them repeat and miss samples.
    def ids(step: int) -> list[int]:
        return samples_of_step(step, seed=7, dataset_size=1000, global_batch=6).tolist()

    assert ids(1) == [707, 512, 48, 689, 197, 338]
    assert ids(401) == [222, 908, 966, 417, 204, 74]


def test_the_order_looks_random() -> None:
    size = 10_000
    order = permute(np.arange(size), size, 99)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
    gaps = np.abs(np.diff(order))
    assert abs(gaps.mean() - size / 3) < 0.05 * size  # the mean distance of two random positions


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17])
def test_tiny_datasets(size: int) -> None:
    ids = samples_of_step(1, seed=0, dataset_size=size, global_batch=2 * size)
    assert sorted(ids.tolist()) == sorted([*range(size)] * 2)


@pytest.mark.parametrize(("ratio", "epochs"), [(0.1, 10), (0.3, 4), (1.0, 1)])
def test_short_epochs_are_parts_of_one_pass_and_cover_the_data(ratio: float, epochs: int) -> None:
    """In ceil(1 / ratio) epochs, whatever the batch, and each with other samples than the one before."""
    size, batch = 700, 7
    steps = steps_of(1, dataset_size=size, global_batch=batch, ratio=ratio)
    assert steps == round(size * ratio / batch)

    def epoch(number: int, order: Order) -> set[int]:
        numbers = range(number * steps + 1, (number + 1) * steps + 1)
        drawn = [samples_of_step(s, seed=3, dataset_size=size, global_batch=batch, order=order) for s in numbers]
        return set(np.concatenate(drawn).tolist())

    found = [epoch(number, Order.rs2) for number in range(epochs)]
    assert set().union(*found) == set(range(size))
    assert all(len(one) == steps * batch for one in found)
    assert all(not found[n] & found[n + 1] for n in range(epochs - 2))
    # It comes round to the same part, where a shuffled order would not.
    if size % (steps * batch) == 0:
        assert epoch(epochs, Order.rs2) == found[0]
        assert ratio == 1 or epoch(epochs, Order.shuffled) != epoch(0, Order.shuffled)


@pytest.mark.parametrize(
    ("epochs", "size", "batch", "steps"), [(1, 10, 5, 2), (1, 11, 5, 3), (0.1, 10, 5, 1), (3, 10, 4, 8)]
)
def test_steps_of_epochs(epochs: float, size: int, batch: int, steps: int) -> None:
    assert steps_of(epochs, dataset_size=size, global_batch=batch) == steps
