"""Re-selections of the layers that a rank computes, together with all ranks that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from checkpointing import Piece
from trainer.methods.entries import Entries
from trainer.methods.selection.choosing import best
from trainer.methods.selection.scores import Subject, scores_of, selection_key
from trainer.methods.sparse.entry_optimizers import accumulators
from trainer.methods.sparse.layer import SparseLayer
from trainer.methods.sparse.places import EntryPlace, assemble
from trainer.methods.sparse.reselection import Candidates, Moments, Renewed, number_to_replace, regrow, renew
from trainer.methods.sparse.trained import Gathered, Trained
from trainer.options.config import Config
from trainer.options.method import Growth, Reselection, Sparse


def is_due(config: Config, method: Sparse, position: int) -> bool:
    """Whether entries are selected anew after so many steps; never after the last."""
    every, steps = method.every, config.train.steps
    if method.schedule is Reselection.once or position >= steps:
        return False
    if method.schedule in (Reselection.narrow, Reselection.rewind):
        return position == (every or max(1, steps // 2))
    return position % every == 0


def reselect(trained: Trained, config: Config, position: int) -> str:
    """Every layer's entries anew, as many as before, one layer after the other; what is said of it."""
    method = trained.method
    weights, values = trained.weights(), trained.values()
    regrows = method.schedule is Reselection.regrow
    if regrows:  # what is dropped goes back to the base
        trained.revert()
    moved = total = near = 0
    for number, (name, layer) in enumerate(trained.layers.items()):
        entries, moments = values.gathered(name)
        if regrows:
            found, close = _regrown(trained, config, number, name, entries, moments, position)
        else:
            found, close = _renewed(trained, config, number, name, entries, moments, weights[name], position)
        fresh = found.entries.indices[found.fresh]
        there = EntryPlace(weights[name], fresh, layer.granularity)
        like = found.entries.originals[found.fresh]
        found.entries.originals[found.fresh] = there.read(like, trained.ranks.group)
        trained.states[name].settled = found.settled
        layer.sparse_indices.copy_(found.entries.indices)
        layer.sparse_originals.copy_(found.entries.originals)
        values.put_back(name, found.entries, found.moments)
        near += close
        moved += int((~torch.isin(found.entries.indices, entries.indices)).sum())
        total += entries.indices.numel()
    trained.replaced()
    return f"{moved:,} of {total:,} entries are new; {say_near(trained.ranks.sum(near))}"


def _regrown(
    trained: Trained, config: Config, number: int, name: str, entries: Entries, moments: Moments, position: int
) -> tuple[Renewed, int]:
    state, layer, ranks = trained.states[name], trained.layers[name], trained.ranks
    count = to_replace(config, trained.method, layer, position)
    by_gradient = trained.method.growth is Growth.gradient
    free = layer.shape[0] * layer.shape[1] - layer.sparse_indices.numel()
    count = min(count, state.candidates.indices.numel() if by_gradient else free)
    drop = grow = None
    near = 0
    if ranks.owns(number):
        drop = best(-entries.values.abs(), count).indices
        chosen = best(state.candidates.sums.abs() if by_gradient else _sm3_scores(layer), count)
        grow, near = chosen.indices, chosen.near
    drop, grow = (ranks.from_owner(number, one, torch.int64) for one in (drop, grow))
    seeds: dict[str, torch.Tensor] = {}
    if by_gradient:
        candidates = state.candidates
        age = torch.full_like(candidates.sums[grow], float(trained.method.window))
        seeds = {"exp_avg": candidates.exp_avg[grow], "exp_avg_sq": candidates.exp_avg_sq[grow], "age": age}
        grow = candidates.indices[grow].long()
        state.candidates = Candidates.of(candidates.indices[:0])
    return regrow(entries, moments, drop, grow, seeds), near


def to_replace(config: Config, method: Sparse, layer: SparseLayer, position: int) -> int:
    """The number of a layer's entries that the re-selection after so many steps replaces."""
    return number_to_replace(
        method.rate, layer.sparse_indices.numel(), position, config.train.steps, first=position == method.every
    )


def _sm3_scores(layer: SparseLayer) -> torch.Tensor:
    """The product of the row's and the column's accumulator, of what does not train."""
    rows, columns = accumulators(layer)
    scores = torch.outer(rows, columns).reshape(-1)
    scores[layer.sparse_indices.long()] = -torch.inf
    return scores


def _renewed(
    trained: Trained,
    config: Config,
    number: int,
    name: str,
    entries: Entries,
    moments: Moments,
    pieces: Sequence[Piece],
    position: int,
) -> tuple[Renewed, int]:
    layer, ranks, method = trained.layers[name], trained.ranks, trained.method
    weight = assemble(pieces, ranks.group, ranks.device, number % ranks.size, layer.shape)
    chosen, near = None, 0
    if ranks.owns(number):
        subject = Subject(weight, selection_key(config.train.seed, name, position), method.rank)
        scores = scores_of(method.selector, subject, layer.granularity, 1).to(ranks.device)
        found = best(scores, entries.indices.numel())
        chosen, near = found.indices, found.near
    chosen = ranks.from_owner(number, chosen, torch.int64)
    return renew(entries, moments, trained.states[name].settled, chosen), near


def narrow(trained: Trained) -> tuple[Gathered, str]:
    """The entries that are still below the threshold; the others are settled with what they learned.

    After Hu et al. 2024 (SaRA, arXiv:2409.06633).
    """
    kept: Gathered = {}
    left = dropped = 0
    values = trained.values()
    for name in trained.layers:
        entries, moments = values.gathered(name)
        still = (entries.originals.float() + entries.values).abs() < trained.method.threshold
        stay, leave = still.nonzero()[:, 0], (~still).nonzero()[:, 0]
        kept[name] = entries.at(stay), {key: whole[stay] for key, whole in moments.items()}
        trained.states[name].settled = trained.states[name].settled.joined(entries.at(leave))
        left, dropped = left + stay.numel(), dropped + leave.numel()
    threshold = trained.method.threshold
    return kept, f"{left:,} entries are still below {threshold:g}; {dropped:,} train no more"


def say_near(count: int) -> str:
    return f"{count} others within 1e-6 of the last one chosen"
