"""The order of samples: a pure function of (seed, step), with one number as its whole state.

Each epoch is a pseudorandom permutation of the dataset, computed for any position without drawing the others: a
Feistel network over the next power of four, and positions that fall outside the dataset walk on until they are inside
(Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
"""

from __future__ import annotations

from math import ceil

import numpy as np
import numpy.typing as npt

from trainer.elastic.randomness import derive
from trainer.options.data import Order

_ROUNDS = 6
Ids = npt.NDArray[np.int64]


def samples_of_step(
    step: int, *, seed: int, dataset_size: int, global_batch: int, order: Order = Order.shuffled
) -> Ids:
    """The ids of the samples that step `step` (counted from 1) consumes, in the order of the global batch.

    Steps follow each other through the epochs without a seam: every sample is consumed once an epoch, also where
    an epoch ends in the middle of a step. `rs2` goes through one order again and again: its short epochs are parts of
    a pass, each other samples than the last (RS2 without replacement; Okanovic et al. 2023, arXiv:2305.18424).
    """
    positions = np.arange((step - 1) * global_batch, step * global_batch, dtype=np.int64)
    epochs, within = np.divmod(positions, dataset_size)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        key = derive(seed, "order", int(epoch) if order is Order.shuffled else 0)
        ids[chosen] = permute(within[chosen], dataset_size, key)
    return ids


def steps_of(epochs: float, *, dataset_size: int, global_batch: int, ratio: float = 1.0) -> int:
    """Optimizer steps of so many epochs, each of `ratio` of the data; the last step may reach into the next."""
    return max(1, ceil(epochs * ratio * dataset_size / global_batch - 1e-9))


def permute(positions: Ids, size: int, key: int) -> Ids:
    """Where a keyed permutation of range(size) sends these positions."""
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    round_keys = [np.uint64(derive(key, round_)) for round_ in range(_ROUNDS)]
    result = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    # The domain is less than four times the size, so few walk on, and each of them not far.
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
    return result.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, round_keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    """A permutation of range(4 ** half_bits), whatever the round function."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of the input changes half of the output."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
