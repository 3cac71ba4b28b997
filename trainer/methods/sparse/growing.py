"""The steps that lead to growing by gradients: candidates by the first micro-batch, then their gradients over a window.

After Ansell et al. 2024 (SpIEL-AG, arXiv:2401.16405).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from trainer.methods.entries import index_dtype
from trainer.methods.sparse.reselecting_layers import is_due, to_replace
from trainer.methods.sparse.reselection import Candidates
from trainer.methods.sparse.trained import Trained
from trainer.methods.sparse.watching import CandidateWatch, ChoiceWatch
from trainer.options.config import Config
from trainer.options.method import Growth, Reselection

CANDIDATES = 2  # for every entry that is to grow


def watch(trained: Trained, config: Config, step: int) -> None:
    """Set the watches of a step, counted from 1."""
    method = trained.method
    if method.schedule is not Reselection.regrow or method.growth is not Growth.gradient:
        return
    left = -step % method.every  # steps until the re-selection, which is after the last of them
    due = is_due(config, method, step + left)
    for name, layer in trained.layers.items():
        candidates = trained.states[name].candidates.indices
        layer.watch = None
        if due and left == method.window:
            count = CANDIDATES * to_replace(config, method, layer, step + left)
            layer.watch = ChoiceWatch(layer, trained.host.tensor_group, count)
        elif due and left < method.window and candidates.numel():
            layer.watch = CandidateWatch(layer, candidates)


def look(trained: Trained, config: Config, norm: torch.Tensor, loss_scale: float | None) -> None:
    """Take in what the watches saw in a step, on all ranks. `norm` is the gradient's before clipping."""
    if all(layer.watch is None for layer in trained.layers.values()):
        return
    clip, ranks = config.optimizer.clip, trained.ranks
    cut = float((clip / (norm + 1e-6)).clamp(max=1.0)) if clip > 0 else 1.0
    betas = (config.optimizer.betas[0], config.optimizer.betas[1])
    for name, layer in trained.layers.items():
        state, seen = trained.states[name], layer.watch
        if isinstance(seen, ChoiceWatch):
            # The first of the ranks computes the first micro-batch.
            state.candidates = Candidates.of(ranks.from_owner(0, seen.chosen, index_dtype(layer.shape)))
        elif isinstance(seen, CandidateWatch):
            if ranks.group is not None:
                dist.all_reduce(seen.total, group=ranks.group)
            if norm.isfinite():  # not of a step that overflowed
                state.candidates.add(seen.total / (loss_scale or 1.0), cut, betas)
        layer.watch = None
