"""Which generations stay, and clearing away the others and what dead saves left behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpointing.format import COMMIT, Manifest
from checkpointing.generations import Generation, look, scan
from checkpointing.lease import held_generations
from checkpointing.lease_protocol import RELEASED
from checkpointing.small_files import read_small
from checkpointing.storage import Storage
from checkpointing.stores import open_storage


@dataclass(frozen=True, slots=True)
class Keep:
    """Which generations stay: the union of these. The newest sound one always does."""

    last: int = 2  # so many of the newest
    every: int = 0  # those whose step is a multiple of it, for ever; 0: none
    best: int = 0  # so many of the best by `metric`; of those without it none
    metric: str = "eval_loss"
    largest: bool = False  # whether a larger metric is better

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0 or self.best < 0:
            raise ValueError(f"{self}: the newest generation always stays, so last is 1 or more; the others 0 or more")

    def chosen(self, current: Sequence[Generation]) -> set[str]:
        """The names of those that stay, of sound generations given newest first."""
        kept = {g.name for g in current[: self.last]}
        if self.every:
            kept |= {g.name for g in current if g.step % self.every == 0}
        sign = -1 if self.largest else 1
        scored = [
            (sign * g.manifest.metrics[self.metric], g) for g in current if g.manifest and self._scores(g.manifest)
        ]
        # Of equal ones the newer: Python's sort keeps their order.
        return kept | {g.name for _, g in sorted(scored, key=lambda s: s[0])[: self.best]}

    def _scores(self, manifest: Manifest) -> bool:
        return self.metric in manifest.metrics


def prune(directory: str | os.PathLike[str] | Storage, keep: Keep) -> list[str]:
    """Delete sound generations but those that stay and those being read; returns the names deleted.

    For one process at a time. Abandoned generations go once `keep.last` others are there; damaged ones do not count,
    and stay for a person to look at.
    """
    storage = open_storage(directory)
    sound = [g for g in scan(storage, remembered=True) if g.sound]
    current = [g for g in sound if not g.abandoned]
    if not all(look(storage, g.name).sound for g in current[: keep.last]):  # that are counted on
        sound = [g for g in scan(storage) if g.sound]
        current = [g for g in sound if not g.abandoned]
    kept = keep.chosen(current)
    doomed = [g for g in current if g.name not in kept]
    doomed += [g for g in sound if g.abandoned] if len(current) >= keep.last else []
    return _delete(storage, doomed)


def clear_released(directory: Path) -> None:
    """Delete claims that were given back; one that is held stays. `directory` is that of the lease."""
    for claim in directory.glob("lease-*.json"):
        if read_small(claim) == RELEASED:
            claim.unlink(missing_ok=True)


def clear_leftovers(storage: Storage) -> list[str]:
    """Delete what saves that never committed left behind; returns the names.

    A save that is still being written holds what it writes, and so does a load: what a living process holds stays.
    """
    dead = [g for g in scan(storage) if not g.committed]
    if not dead:
        return []
    held = held_generations(storage)
    # Looked at again after the holds: a save that ended meanwhile has committed before it let go.
    committed = {g.name for g in scan(storage) if g.committed}
    dead = [g for g in dead if g.name not in held | committed]
    for generation in dead:
        storage.delete(f"{generation.name}/{name}" for name in generation.files)
    return [g.name for g in dead]


def _delete(storage: Storage, generations: Sequence[Generation]) -> list[str]:
    """COMMIT first: a deletion that is interrupted leaves something that is no generation, not half of one.

    A reader takes its hold before it looks for COMMIT. So one that came after the look at the holds and still found
    COMMIT is seen by the second look, and is left the files; they are cleared away later.
    """
    if not generations:
        return []
    held = held_generations(storage)
    free = [g for g in generations if g.name not in held]
    for generation in free:
        storage.delete([f"{generation.name}/{COMMIT}"])
    held = held_generations(storage)
    for generation in free:
        if generation.name not in held:
            storage.delete(f"{generation.name}/{name}" for name in generation.files)
    return [g.name for g in free]
