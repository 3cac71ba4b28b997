"""This rank's share of every step's global batch, and of the held-out set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.dataset import Batch, Dataset, collate
from trainer.data.order import Ids, samples_of_step
from trainer.elastic.batch import deal
from trainer.options.data import Order


@dataclass(frozen=True)
class StepShare:
    """One rank's micro-batches of a step, each with its number, and what the whole global batch counts."""

    micro_batches: list[tuple[int, Batch]]
    num_targets: int
    num_tokens: int
    sample_ids: Ids


class Feed:
    """Deals samples to ranks. It has no state: everything follows from the step."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int,
        pad: int,
        num_ranks: int,
        rank: int,
        order: Order = Order.shuffled,
    ) -> None:
        self.dataset = dataset
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.seed, self.pad, self.order = seed, pad, order
        self.num_ranks, self.rank = num_ranks, rank

    def step(self, step: int) -> StepShare:
        """This rank's share of step `step`, counted from 1."""
        ids = samples_of_step(
            step,
            seed=self.seed,
            dataset_size=len(self.dataset),
            global_batch=self.global_batch,
            order=self.order,
        )
        return StepShare(self._dealt(ids), self.dataset.num_targets(ids), self.dataset.num_tokens(ids), ids)

    def evenly(self, dataset: Dataset, num_samples: int) -> StepShare:
        """This rank's share of `num_samples` samples spread evenly over another dataset; 0 takes all of them."""
        count = min(num_samples or len(dataset), len(dataset))
        ids = np.linspace(0, len(dataset) - 1, count).astype(np.int64)
        return StepShare(self._dealt(ids, dataset), dataset.num_targets(ids), dataset.num_tokens(ids), ids)

    def _dealt(self, ids: Ids, dataset: Dataset | None = None) -> list[tuple[int, Batch]]:
        dataset = dataset or self.dataset
        parts = [ids[start : start + self.micro_batch] for start in range(0, len(ids), self.micro_batch)]
        dealt = []
        for number in deal(len(parts), self.num_ranks, self.rank):
            batch = collate(dataset, parts[number or 0], self.pad)
            # Nothing left for this rank: it computes along without targets, because the others need it there.
            dealt.append((number, batch) if number is not None else (len(parts), batch.without_targets()))
        return dealt
