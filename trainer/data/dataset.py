"""Datasets of tokenized samples, addressed by id, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from trainer.data.order import Ids
from trainer.data.tokenizer import Tokens

IGNORE = -100  # the label of a position that is no target, as torch's cross entropy has it
Mask = npt.NDArray[np.bool_]


class Sample(NamedTuple):
    """Tokens, and which of them are targets: predicted from those before, and counted in the loss. Never the first."""

    tokens: Tokens
    targets: Mask


def predicted(tokens: Tokens, first: int = 1) -> Sample:
    """With all tokens from `first` on as targets."""
    return Sample(tokens, np.arange(len(tokens)) >= max(first, 1))


class Dataset(Protocol):
    """Samples of at most seq_len + 1 tokens."""

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and of how they are cut: equal fingerprints, equal training."""

    @property
    def largest_token(self) -> int: ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...

    def num_tokens(self, ids: Ids) -> int:
        """How many input tokens these samples have, without padding."""

    def num_targets(self, ids: Ids) -> int:
        """How many tokens of these samples are predicted, and so count in the loss."""


class Windows:
    """A stream of tokens cut into windows of `seq_len` targets; each token but the first is a target once."""

    def __init__(self, tokens: Tokens, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.fingerprint = _hash([tokens], f"windows of {seq_len}")
        self.largest_token = int(tokens.max(initial=0))

    def __len__(self) -> int:
        return -(-max(len(self.tokens) - 1, 0) // self.seq_len)

    def sample(self, index: int) -> Sample:
        start = index * self.seq_len
        return predicted(self.tokens[start : start + self.seq_len + 1])

    def num_tokens(self, ids: Ids) -> int:
        short = (len(self) * self.seq_len) - (len(self.tokens) - 1)  # what the last window lacks
        return len(ids) * self.seq_len - short * int((ids == len(self) - 1).sum())

    def num_targets(self, ids: Ids) -> int:
        return self.num_tokens(ids)


class Records:
    """Samples of different lengths, each with its own targets."""

    def __init__(self, samples: Sequence[Sample], seq_len: int) -> None:
        lengths = np.array([len(tokens) for tokens, _ in samples], dtype=np.int64)
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._tokens = np.concatenate([tokens for tokens, _ in samples]) if samples else np.zeros(0, np.int32)
        self._targets = np.concatenate([targets for _, targets in samples]) if samples else np.zeros(0, np.bool_)
        self._num_targets = np.array([targets.sum() for _, targets in samples], dtype=np.int64)
        self.fingerprint = _hash([self._tokens, self._ends, np.packbits(self._targets)], f"records of {seq_len}")
        self.largest_token = int(self._tokens.max(initial=0))

    def __len__(self) -> int:
        return len(self._ends)

    def sample(self, index: int) -> Sample:
        part = slice(self._starts[index], self._ends[index])
        return Sample(self._tokens[part], self._targets[part])

    def num_tokens(self, ids: Ids) -> int:
        return int((self._ends[ids] - self._starts[ids] - 1).sum())

    def num_targets(self, ids: Ids) -> int:
        return int(self._num_targets[ids].sum())


@dataclass(frozen=True)
class Batch:
    """`inputs` and `labels` of shape [samples, positions]: a label is the next token, or IGNORE if it is no target."""

    inputs: torch.Tensor
    labels: torch.Tensor
    ids: Ids

    def without_targets(self) -> Batch:
        """The same inputs with nothing to predict: its loss and its gradients are exactly zero."""
        return Batch(self.inputs, torch.full_like(self.labels, IGNORE), self.ids[:0])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.inputs.to(device), self.labels.to(device), self.ids)

    def split(self, size: int | None) -> Iterable[Batch]:
        """Parts of at most `size` samples; padded alike, so that they compute what the whole would."""
        for start in range(0, len(self.inputs), size or len(self.inputs)):
            rows = slice(start, start + (size or len(self.inputs)))
            yield Batch(self.inputs[rows], self.labels[rows], self.ids[rows])


def collate(dataset: Dataset, ids: Ids, pad: int) -> Batch:
    """Samples padded on the right to the longest of them. Causal attention never looks there."""
    samples = [dataset.sample(int(i)) for i in ids]
    width = max(len(tokens) for tokens, _ in samples) - 1
    inputs = np.full((len(ids), width), pad, dtype=np.int64)
    labels = np.full((len(ids), width), IGNORE, dtype=np.int64)
    for row, (tokens, targets) in enumerate(samples):
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, : len(tokens) - 1][targets[1:]] = tokens[targets]
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), ids)


def _hash(arrays: Iterable[npt.NDArray[np.generic]], how: str) -> str:
    hasher = xxhash.xxh3_128(how.encode())
    for array in arrays:
        hasher.update(f"{array.dtype.str}{array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()
