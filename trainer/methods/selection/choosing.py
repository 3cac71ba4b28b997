"""The best entries, exactly so many, on one rank or on several: ties go to the lower index.

A weight is scored by one rank, its owner, and the ranks take turns; what travels are the indices of what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

NEAR = 1e-6  # relative: scores that another order of summing may move past each other
COUNTED = 1024  # of those, at most so many are counted where weights are chosen from together


@dataclass(frozen=True)
class Chosen:
    indices: torch.Tensor  # sorted, int64
    near: int  # how many others have a score within `NEAR` of the last one chosen


def best(scores: torch.Tensor, count: int) -> Chosen:
    """The highest of one-dimensional scores; what is no number comes last."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    count = min(count, scores.numel())
    if count == 0:
        return Chosen(torch.empty(0, dtype=torch.int64, device=scores.device), 0)
    last = scores.topk(count).values[-1]
    above = (scores > last).nonzero()[:, 0]
    equal = (scores == last).nonzero()[: count - above.numel(), 0]
    near = int(((scores - last).abs() <= NEAR * last.abs()).sum()) - 1
    return Chosen(torch.cat([above, equal]).sort().values, max(near, 0))


class _Candidates(NamedTuple):
    """Sorted by weight and index, as one long vector of all weights would be."""

    scores: torch.Tensor  # fp64
    weights: torch.Tensor  # the number of each one's weight
    indices: torch.Tensor

    @staticmethod
    def of(scores: torch.Tensor, number: int, count: int) -> _Candidates:
        """The candidates of one weight: entries that may be among the best `count` of all, or near."""
        kept = _near_best(scores, count)
        return _Candidates(scores[kept], torch.full_like(kept, number), kept)

    def joined(self, other: _Candidates, count: int) -> _Candidates:
        """The best `count` of both, and up to `COUNTED` that are near the last of them.

        What falls out is below it by more than `NEAR`, and so below the last one of any that are chosen later.
        """
        scores, weights, indices = (torch.cat(pair) for pair in zip(self, other, strict=True))
        order = torch.argsort(indices, stable=True)
        order = order[torch.argsort(weights[order], stable=True)]
        kept = order[_near_best(scores[order], count)]
        return _Candidates(scores[kept], weights[kept], indices[kept])


def _near_best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of the best, and of others within `NEAR` of the last of them."""
    chosen = best(scores, count).indices
    if count == 0 or chosen.numel() == scores.numel():
        return chosen
    last = scores[chosen].min()
    rest = scores >= last - NEAR * last.abs()
    rest[chosen] = False
    return torch.cat([chosen, rest.nonzero()[:COUNTED, 0]]).sort().values


Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Ranks:
    """The ranks that choose together: all of them call the same functions in the same order."""

    device: torch.device
    group: dist.ProcessGroup | None
    rank: int
    size: int

    @staticmethod
    def of(group: dist.ProcessGroup | None, device: torch.device) -> Ranks:
        """The ranks of a group; without one this rank alone."""
        alone = group is None
        return Ranks(device, group, 0 if alone else dist.get_rank(group), 1 if alone else dist.get_world_size(group))

    def from_owner(self, number: int, indices: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Send the owner's indices of weight `number` to all ranks; others give None."""
        if self.group is None:
            assert indices is not None
            return indices.to(dtype)
        owner = number % self.size
        length = torch.tensor([0 if indices is None else indices.numel()], device=self.device)
        dist.broadcast(length, group=self.group, group_src=owner)
        found = torch.empty(int(length), dtype=dtype, device=self.device) if indices is None else indices.to(dtype)
        dist.broadcast(found, group=self.group, group_src=owner)
        return found

    def owns(self, number: int) -> bool:
        return number % self.size == self.rank

    def gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's one-dimensional tensor, of lengths that may differ."""
        if self.group is None:
            return [mine]
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([mine.numel()], device=self.device), group=self.group)
        longest = max(int(n) for n in lengths)
        padded = mine.new_zeros(longest)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]

    def merge(self, mine: Parts, join: Callable[[Parts, Parts], Parts]) -> Parts:
        """Join all ranks' tuples, pair by pair; the result is on all of them, and no rank holds more than two.

        Tensors of a tuple are equally long, and each has one dtype on all ranks.
        """
        distance = 1
        while distance < self.size:
            if self.rank % (2 * distance) == distance:
                self._send(mine, self.rank - distance)
            elif self.rank % (2 * distance) == 0 and self.rank + distance < self.size:
                mine = join(mine, self._receive(mine, self.rank + distance))
            distance *= 2
        return tuple(self.from_owner(0, part if self.rank == 0 else None, part.dtype) for part in mine)

    def _send(self, parts: Parts, to: int) -> None:
        dist.send(torch.tensor([parts[0].numel()], device=self.device), group=self.group, group_dst=to)
        for part in parts:
            dist.send(part.contiguous(), group=self.group, group_dst=to)

    def _receive(self, like: Parts, source: int) -> Parts:
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        dist.recv(length, group=self.group, group_src=source)
        found = tuple(torch.empty(int(length), dtype=part.dtype, device=self.device) for part in like)
        for part in found:
            dist.recv(part, group=self.group, group_src=source)
        return found

    def union(self, here: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Indices of weights that some ranks have, on all of them; without those that nobody has. On the CPU."""
        found = {}
        for name in names:
            parts = self.gather(here.get(name, torch.empty(0, dtype=torch.int64, device=self.device)).long())
            longest = max(parts, key=torch.Tensor.numel)
            if longest.numel():
                found[name] = longest.cpu()
        return found

    def sum(self, number: int) -> int:
        if self.group is None:
            return number
        total = torch.tensor([number], device=self.device)
        dist.all_reduce(total, group=self.group)
        return int(total)


# Scores of weight `number`, on its owner; others take part in what it needs of them, and get None.
Scorer = Callable[[int, bool], "torch.Tensor | None"]


def choose_each(scorer: Scorer, counts: Sequence[int], ranks: Ranks) -> tuple[list[torch.Tensor], int]:
    """Choose from every weight its own count: the indices on all ranks, and how many were near the last one chosen."""
    found, near = [], 0
    for number, count in enumerate(counts):
        scores = scorer(number, ranks.owns(number))
        mine = None if scores is None else best(scores, count)
        near += 0 if mine is None else mine.near
        found.append(ranks.from_owner(number, None if mine is None else mine.indices.to(ranks.device), torch.int64))
    return found, ranks.sum(near)


def choose_together(scorer: Scorer, num_weights: int, count: int, ranks: Ranks) -> tuple[list[torch.Tensor], int]:
    """The best of all weights together: of no more than about twice `count` candidates a rank holds or hears."""
    mine = _Candidates.of(torch.empty(0, dtype=torch.float64, device=ranks.device), 0, count)
    for number in range(num_weights):
        scores = scorer(number, ranks.owns(number))
        if scores is not None:
            mine = mine.joined(_Candidates.of(scores.double().to(ranks.device), number, count), count)
    scores, weights, indices = ranks.merge(mine, lambda a, b: _Candidates(*a).joined(_Candidates(*b), count))
    chosen = best(scores, count)
    weights, indices = weights[chosen.indices], indices[chosen.indices]
    return [indices[weights == number] for number in range(num_weights)], chosen.near


def choose_above(scorer: Scorer, num_weights: int, least: float, ranks: Ranks) -> tuple[list[torch.Tensor], int]:
    """All whose score is more than `least`."""
    found, near = [], 0
    for number in range(num_weights):
        scores = scorer(number, ranks.owns(number))
        mine = None
        if scores is not None:
            mine = (scores > least).nonzero()[:, 0].to(ranks.device)
            near += int(((scores - least).abs() <= NEAR * abs(least)).sum())
        found.append(ranks.from_owner(number, mine, torch.int64))
    return found, ranks.sum(near)
