"""Evidence for selectors beside weights: gradients of some micro-batches, and what a full phase has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.methods.method import Backwards
from trainer.methods.selection.choosing import Ranks
from trainer.methods.selection.scores import Subject
from trainer.methods.sparse.attach import targets_of
from trainer.methods.sparse.places import assemble
from trainer.methods.sparse.trained import Trained
from trainer.methods.sparse.watching import GradientWatch
from trainer.options.method import Selector, Sparse

# Of a weight, on the rank that owns it; all ranks ask together, in the model's order.
Subjects = Callable[[str, bool], "Subject | None"]
EARLY = (Selector.gradient, Selector.squared_gradient)  # need gradients before anything trains


def by_gradient(trained: Trained, base: nn.Module, world: Ranks, backwards: Backwards) -> Subjects:
    """Sums over the micro-batches of all data ranks of gradients, or of their squares.

    A layer of the model at a time: of no other are dense gradients in memory, at the price of a pass each.
    """
    targets = targets_of(base, trained.method)
    numbers = {name: number for number, name in enumerate(targets)}
    sums: dict[str, torch.Tensor | None] = {}

    def subject(name: str, mine: bool) -> Subject | None:
        if name not in sums:
            sums.clear()
            together = [other for other in targets if layer_of(other) == layer_of(name)]
            sums.update(_gradients(trained, together, backwards))
        whole: Any = targets[name][0].weight
        total = sums.pop(name)
        if total is None:
            total = torch.zeros(whole.shape, device=world.device)
        if world.group is not None:
            dist.reduce(total, group_dst=numbers[name] % world.size, group=world.group)
        return Subject(whole.detach().to(world.device), 0, 0, gradient=total) if mine else None

    return subject


def _gradients(trained: Trained, names: Sequence[str], backwards: Backwards) -> Mapping[str, torch.Tensor | None]:
    """Sum this data rank's gradients, on one of its ranks."""
    host, layers = trained.host, trained.layers
    squared = trained.method.selector is Selector.squared_gradient
    watches = {n: GradientWatch(layers[n], host.tensor_group, squared) for n in names if n in layers}
    for name, watch in watches.items():
        layers[name].watch = watch

    def flush() -> None:
        for watch in watches.values():
            watch.flush()

    backwards(flush)
    for name in watches:
        layers[name].watch = None
    return {n: watches[n].total if n in watches and host.tensor_rank == 0 else None for n in names}


def by_change(trained: Trained, base: nn.Module, world: Ranks) -> Subjects:
    """The difference of what was trained as it is from the base."""
    method: Sparse = trained.method
    targets = targets_of(base, method)
    numbers = {name: number for number, name in enumerate(targets)}
    held = trained.weights()

    def subject(name: str, mine: bool) -> Subject | None:
        before: Any = targets[name][0].weight
        owner = numbers[name] % world.size
        whole = assemble(held.get(name, []), world.group, world.device, owner, tuple(before.shape))
        return Subject(whole, 0, 0, base=before.detach().to(world.device)) if mine else None

    return subject


def layer_of(name: str) -> str:
    """The layer of the model that a weight belongs to, as `model.layers.3`; its name where it has no number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])
