"""Several datasets as one, in given shares."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from trainer.data.dataset import Dataset, Sample, hashed
from trainer.data.order import Ids


class Mixture:
    """`counts[i]` samples of dataset i an epoch: each of its samples equally often, or once more."""

    packs = False

    def __init__(self, datasets: Sequence[Dataset], counts: Sequence[int]) -> None:
        """No dataset that counts may be empty."""
        self.datasets = datasets
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._starts = self._ends - np.array(counts, dtype=np.int64)
        told = " ".join(f"{count} of {dataset.fingerprint}" for dataset, count in zip(datasets, counts, strict=True))
        self.fingerprint = hashed([], f"mixture of {told}")
        self.largest_token = max(
            (d.largest_token for d, count in zip(datasets, counts, strict=True) if count), default=0
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def sample(self, index: int) -> Sample:
        at = int(np.searchsorted(self._ends, index, side="right"))
        return self.datasets[at].sample(int((index - self._starts[at]) % len(self.datasets[at])))

    def row(self, index: int) -> list[Sample]:
        return [self.sample(index)]

    def num_tokens(self, ids: Ids) -> int:
        return sum(self.datasets[at].num_tokens(own) for at, own in self._own(ids))

    def num_targets(self, ids: Ids) -> int:
        return sum(self.datasets[at].num_targets(own) for at, own in self._own(ids))

    def _own(self, ids: Ids) -> list[tuple[int, Ids]]:
        """Which of every dataset's samples these are."""
        found = np.searchsorted(self._ends, ids, side="right")
        return [(int(at), (ids[found == at] - self._starts[at]) % len(self.datasets[at])) for at in np.unique(found)]


def counts_of(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Samples of each dataset in an epoch, which is as short as can be with every sample in it at least once."""
    whole = sum(shares)
    length = max(size * whole / share for size, share in zip(sizes, shares, strict=True))
    return [max(size, ceil(length * share / whole - 1e-9)) for size, share in zip(sizes, shares, strict=True)]
