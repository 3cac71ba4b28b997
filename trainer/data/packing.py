"""Several samples in one row, so that little of a batch is padding. Each is computed as if it were alone.

Attention looks at nothing before a sample's own start, and positions begin again there. Which samples share a row is
the same in every epoch and on every world: the order of rows is drawn, as that of samples is elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from trainer.data.dataset import Dataset, Sample, hashed
from trainer.data.order import Ids


class Packed:
    """Rows of at most `seq_len` inputs; each sample is in one row, whole."""

    packs = True

    def __init__(self, dataset: Dataset, seq_len: int) -> None:
        self.dataset = dataset
        lengths = np.array([dataset.num_tokens(np.array([i])) for i in range(len(dataset))], dtype=np.int64)
        rows = first_fit(lengths, seq_len)
        self._ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        self._members = np.array([member for row in rows for member in row], dtype=np.int64)
        self.fingerprint = hashed([self._members, self._ends], f"packed {dataset.fingerprint}")
        self.largest_token = dataset.largest_token
        self.filled = float(lengths.sum() / max(1, len(rows) * seq_len))  # of all places in the rows

    def __len__(self) -> int:
        return len(self._ends)

    def members(self, index: int) -> Ids:
        """The samples of a row."""
        return self._members[self._ends[index - 1] if index else 0 : self._ends[index]]

    def row(self, index: int) -> list[Sample]:
        return [self.dataset.sample(int(member)) for member in self.members(index)]

    def sample(self, index: int) -> Sample:
        """The first of a row."""
        return self.dataset.sample(int(self.members(index)[0]))

    def num_tokens(self, ids: Ids) -> int:
        return self.dataset.num_tokens(self._all(ids))

    def num_targets(self, ids: Ids) -> int:
        return self.dataset.num_targets(self._all(ids))

    def _all(self, ids: Ids) -> Ids:
        return np.concatenate([self.members(int(i)) for i in ids]) if len(ids) else ids


def first_fit(lengths: Ids, room: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `room`: the longest first, each where least room stays.

    (Best fit decreasing: at most 11/9 of the fewest rows there can be, and a fraction; Johnson 1973.)
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # the room that is left and the row, in order
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        at = bisect_left(open_rows, (length, 0))
        if at == len(open_rows):
            left, row = room, len(rows)
            rows.append([])
        else:
            left, row = open_rows.pop(at)
        rows[row].append(int(index))
        if left > length:
            insort(open_rows, (left - length, row))
    return rows
