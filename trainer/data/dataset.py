"""Datasets of tokenized samples, addressed by id, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.nn import functional

from trainer.data.order import Ids
from trainer.data.tokenizer import Tokens

SAMPLES_AT_ONCE = 10_000
IGNORE = -100  # the label of a position that is no target, as torch's cross entropy has it
Mask = npt.NDArray[np.bool_]


class Sample(NamedTuple):
    """Tokens, and which of them are targets: predicted from those before, and counted in the loss. Never the first."""

    tokens: Tokens
    targets: Mask


def predicted(tokens: Tokens, first: int = 1) -> Sample:
    """A sample whose targets are all tokens from `first` on."""
    return Sample(tokens, np.arange(len(tokens)) >= max(first, 1))


class Dataset(Protocol):
    """Samples of at most seq_len + 1 tokens."""

    packs: bool  # whether rows may hold several samples

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and of how they are cut: equal fingerprints, equal training."""

    @property
    def largest_token(self) -> int: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...

    def row(self, index: int) -> list[Sample]:
        """The samples of one row under this id: one, or several that do not see each other."""

    def num_tokens(self, ids: Ids) -> int:
        """How many input tokens these samples have, without padding."""

    def num_targets(self, ids: Ids) -> int:
        """How many tokens of these samples are predicted, and so count in the loss."""


class Windows:
    """A stream of tokens cut into windows of `seq_len` targets; each token but the first is a target once."""

    packs = False

    def __init__(self, tokens: Tokens, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.fingerprint = hashed([tokens], f"windows of {seq_len}")
        self.largest_token = int(tokens.max(initial=0))

    def __len__(self) -> int:
        return -(-max(len(self.tokens) - 1, 0) // self.seq_len)

    def sample(self, index: int) -> Sample:
        start = index * self.seq_len
        return predicted(self.tokens[start : start + self.seq_len + 1])

    def row(self, index: int) -> list[Sample]:
        return [self.sample(index)]

    def num_tokens(self, ids: Ids) -> int:
        short = (len(self) * self.seq_len) - (len(self.tokens) - 1)  # what the last window lacks
        return len(ids) * self.seq_len - short * int((ids == len(self) - 1).sum())

    def num_targets(self, ids: Ids) -> int:
        return self.num_tokens(ids)


class Joined(NamedTuple):
    """Samples one after the other: their tokens, their targets, and where each ends."""

    tokens: Tokens
    targets: Mask
    ends: npt.NDArray[np.int64]

    @staticmethod
    def of(samples: Sequence[Sample]) -> Joined:
        ends = np.cumsum([len(tokens) for tokens, _ in samples], dtype=np.int64)
        if not samples:
            return Joined(np.zeros(0, np.int32), np.zeros(0, np.bool_), ends)
        return Joined(np.concatenate([t for t, _ in samples]), np.concatenate([m for _, m in samples]), ends)


def _sums(targets: Mask, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many targets each sample has; none is empty."""
    return np.add.reduceat(targets, starts, dtype=np.int64) if len(starts) else np.zeros(0, np.int64)


def _first(targets: Mask, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Each sample's first target, counted from its beginning; 0 where it has none."""
    found = np.zeros(len(starts), np.int64)
    ends = np.append(starts[1:], len(targets))
    for at in range(0, len(starts), SAMPLES_AT_ONCE):  # places are eight times as large as targets
        some, last = starts[at : at + SAMPLES_AT_ONCE], ends[min(at + SAMPLES_AT_ONCE, len(starts)) - 1]
        places = np.append(np.flatnonzero(targets[some[0] : last]) + some[0], last)
        first = places[np.searchsorted(places, some)]
        has = first < ends[at : at + SAMPLES_AT_ONCE]
        found[at : at + SAMPLES_AT_ONCE] = np.where(has, first - some, 0)
    return found


class Records:
    """Samples of different lengths, each with its own targets."""

    packs = False

    def __init__(self, samples: Sequence[Sample] | Joined, seq_len: int) -> None:
        joined = samples if isinstance(samples, Joined) else Joined.of(samples)
        self._tokens, self._targets, self._ends = joined
        self._starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)[: len(self._ends)]
        self._num_targets = _sums(self._targets, self._starts)
        first = _first(self._targets, self._starts)
        lengths = self._ends - self._starts
        ends_with_them = bool((lengths - first == self._num_targets).all())  # prompt and completion, as of old
        how = first if ends_with_them else np.packbits(self._targets)
        self.fingerprint = hashed([self._tokens, self._ends, how], f"records of {seq_len}")
        self.largest_token = int(self._tokens.max(initial=0))

    def __len__(self) -> int:
        return len(self._ends)

    def sample(self, index: int) -> Sample:
        part = slice(self._starts[index], self._ends[index])
        return Sample(self._tokens[part], self._targets[part])

    def row(self, index: int) -> list[Sample]:
        return [self.sample(index)]

    def num_tokens(self, ids: Ids) -> int:
        return int((self._ends[ids] - self._starts[ids] - 1).sum())

    def num_targets(self, ids: Ids) -> int:
        return int(self._num_targets[ids].sum())


@dataclass(frozen=True)
class Batch:
    """`inputs` and `labels` of shape [rows, width]: a label is the next token, or IGNORE if it is no target.

    Where rows hold several samples, `positions` of the same shape begin at 0 with each of them.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    ids: Ids
    positions: torch.Tensor | None = None

    def without_targets(self) -> Batch:
        """The same inputs with nothing to predict: its loss and its gradients are exactly zero."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE), ids=self.ids[:0])

    def to(self, device: torch.device) -> Batch:
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.inputs.to(device), self.labels.to(device), self.ids, positions)

    def split(self, size: int | None) -> Iterable[Batch]:
        """Parts of at most `size` rows; padded alike, so that they compute what the whole would."""
        for start in range(0, len(self.inputs), size or len(self.inputs)):
            rows = slice(start, start + (size or len(self.inputs)))
            positions = None if self.positions is None else self.positions[rows]
            yield Batch(self.inputs[rows], self.labels[rows], self.ids[rows], positions)

    def widened(self, rows: int, width: int, pad: int = 0) -> Batch:
        """Add rows and columns without targets, which nothing before them looks at."""
        more = (0, width - self.inputs.shape[1], 0, rows - self.inputs.shape[0])
        positions = self.positions
        if positions is not None:  # what is added is a sample of its own
            added = torch.arange(width, device=positions.device).repeat(rows, 1)
            added[: len(positions), positions.shape[1] :] -= positions.shape[1]
            added[: len(positions), : positions.shape[1]] = positions
            positions = added
        return Batch(
            functional.pad(self.inputs, more, value=pad),
            functional.pad(self.labels, more, value=IGNORE),
            self.ids,
            positions,
        )


def collate(dataset: Dataset, ids: Ids, pad: int) -> Batch:
    """Rows padded on the right to the longest of them. Causal attention never looks there."""
    rows = [dataset.row(int(i)) for i in ids]
    width = max(sum(len(tokens) - 1 for tokens, _ in row) for row in rows)
    inputs = np.full((len(ids), width), pad, dtype=np.int64)
    labels = np.full((len(ids), width), IGNORE, dtype=np.int64)
    positions = np.zeros((len(ids), width), dtype=np.int64)
    for row, samples in enumerate(rows):
        start = 0
        for tokens, targets in samples:
            part = slice(start, start + len(tokens) - 1)
            inputs[row, part] = tokens[:-1]
            labels[row, part][targets[1:]] = tokens[targets]
            positions[row, part] = np.arange(len(tokens) - 1)
            start = part.stop
        positions[row, start:] = np.arange(width - start)
    begun_again = torch.from_numpy(positions) if dataset.packs else None
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), ids, begun_again)


def hashed(arrays: Iterable[npt.NDArray[np.generic]], how: str) -> str:
    hasher = xxhash.xxh3_128(how.encode())
    for array in arrays:
        hasher.update(f"{array.dtype.str}{array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()
