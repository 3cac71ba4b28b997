"""Which generations stay, and clearing away the others and what dead saves left behind."""

from __future__ import annotations

from checkpointing.format import COMMIT
from checkpointing.generations import Generation, scan
from checkpointing.storage import Storage


def prune(storage: Storage, keep: int) -> list[str]:
    """Delete sound generations but the newest `keep`; returns the names deleted. For one process at a time.

    Abandoned generations go first, whatever their number; damaged ones do not count, and stay for a person to look at.
    The newest sound generation is never deleted.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, and {keep} was given: the newest generation always stays")
    sound = [g for g in scan(storage) if g.sound]
    current = [g for g in sound if not g.abandoned]
    doomed = current[keep:] + ([g for g in sound if g.abandoned] if len(current) >= keep else [])
    for generation in doomed:
        _delete(storage, generation)
    return [g.name for g in doomed]


def clear_leftovers(storage: Storage) -> list[str]:
    """Delete what saves that never committed left behind; returns the names. The caller must hold the run's lease."""
    dead = [g for g in scan(storage) if not g.committed]
    for generation in dead:
        _delete(storage, generation)
    return [g.name for g in dead]


def _delete(storage: Storage, generation: Generation) -> None:
    """COMMIT first: a deletion that is interrupted leaves something that is no generation, not half of one."""
    storage.delete([f"{generation.name}/{COMMIT}"])
    storage.delete(f"{generation.name}/{name}" for name in generation.files)
