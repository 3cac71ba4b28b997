"""`save`: every rank prepares, then rank 0 commits. Nothing exists until COMMIT does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch.distributed as dist

from checkpointing.collective import Team, as_team
from checkpointing.errors import CheckpointError, LayoutError, first_few
from checkpointing.format import (
    COMMIT,
    MANIFEST,
    Manifest,
    Writer,
    digest,
    encode_manifest,
    generation_name,
    index_name,
    shard_name,
)
from checkpointing.generations import check_files, scan
from checkpointing.geometry import Piece
from checkpointing.plan import Row, layout_rows
from checkpointing.planner import agree_on_plan
from checkpointing.storage import FileStorage, Storage
from checkpointing.writer import write_shard


def save(
    directory: str | os.PathLike[str] | Storage,
    step: int,
    pieces: Sequence[Piece],
    objects: dict[str, Any] | None = None,
    group: dist.ProcessGroup | Team | None = None,
    *,
    run_id: str = "",
    incarnation: int | None = None,
    metrics: dict[str, float] | None = None,
    guard: Callable[[], None] | None = None,
) -> str:
    """Save the pieces of all ranks as a new generation, and return its name. Collective; synchronous.

    `objects` are JSON values, rank 0's are kept. The generation is durable when this returns. If any rank fails,
    all raise with its reason and the previous generation stays the newest. `incarnation` counts the run's resumes:
    the newest generation is the greatest by (incarnation, step), and of one step the one saved last; by default it is
    that of the newest generation there. `metrics` are finite numbers, rank 0's, for retention to choose by. `guard` is
    called on rank 0 right before the commit, and stops it by raising.
    """
    team, storage = as_team(group), as_storage(directory)
    rows: list[Row] = []

    def describe() -> int:
        nonlocal rows
        rows = _describe(step, pieces, objects or {}, metrics or {})
        return step

    steps = team.together(describe)
    if others := [rank for rank, other in enumerate(steps) if other != steps[0]]:
        raise LayoutError(f"rank {others[0]} saves step {steps[others[0]]}, rank 0 step {steps[0]}")
    plan = agree_on_plan(team, rows)
    begun = team.together(lambda: asdict(_begin(storage, incarnation)) if team.rank == 0 else None)[0]
    start = _Start(**begun)
    name = generation_name(step, start.save_id)

    def prepare() -> dict[str, Any] | None:
        own = (objects or {}) if team.rank == 0 else {}
        writer = write_shard(storage, name, plan, pieces, team.rank, start.save_id, own)
        return asdict(writer) if writer else None

    def commit(writers: list[Writer]) -> None:
        manifest = Manifest(
            step=step,
            run_id=run_id,
            created=time.time(),
            world_size=team.size,
            versions=_versions(),
            metrics=metrics or {},
            writers=writers,
            tensors=plan.tensors,
            **asdict(start),
        )
        _commit(storage, manifest, guard)

    try:
        prepared = [Writer(**record) for record in team.together(prepare) if record is not None]
        team.together(lambda: commit(prepared) if team.rank == 0 else None)
    except Exception:
        _discard(storage, name, team.rank)
        raise
    return name


def as_storage(directory: str | os.PathLike[str] | Storage) -> Storage:
    return FileStorage(directory) if isinstance(directory, str | os.PathLike) else directory


@dataclass(frozen=True, slots=True)
class _Start:
    """What rank 0 decides for all when a save begins."""

    save_id: str
    parent: str
    incarnation: int
    serial: int


def _describe(step: int, pieces: Sequence[Piece], objects: dict[str, Any], metrics: dict[str, float]) -> list[Row]:
    """This rank's layout; what it cannot store is refused before anything is written."""
    if step < 0:
        raise LayoutError(f"step {step} cannot be saved: steps are counted from 0")
    if bad := [name for name, value in metrics.items() if not isfinite(value)]:
        raise LayoutError(f"metrics must be finite numbers, and these are not: {first_few(bad)}")
    try:
        same = json.loads(json.dumps(objects, allow_nan=False)) == objects
    except (TypeError, ValueError) as error:
        raise LayoutError(f"objects must be plain finite JSON values: {error}") from None
    if not same:
        raise LayoutError("objects must be plain JSON values: tuples and keys that are no strings come back changed")
    return layout_rows(pieces)


def _begin(storage: Storage, incarnation: int | None) -> _Start:
    found = scan(storage)
    parent = next((g.manifest for g in found if g.sound and not g.abandoned), None)
    if incarnation is None:
        incarnation = parent.incarnation if parent else 0
    serial = 1 + max((g.manifest.serial for g in found if g.manifest), default=0)
    return _Start(secrets.token_hex(16), parent.save_id if parent else "", incarnation, serial)


def _commit(storage: Storage, manifest: Manifest, guard: Callable[[], None] | None) -> None:
    """COMMIT comes last, after the manifest that it vouches for, and vouches only for what is there.

    Every rank's files are durable by now, but a rank may have another directory mounted under the same name.
    """
    prefix = f"{manifest.generation}/"
    check_files(manifest, {name.removeprefix(prefix): size for name, size in storage.list(prefix).items()})
    data = encode_manifest(manifest)
    storage.put(f"{prefix}{MANIFEST}", [data])
    if guard is not None:
        guard()
    created = storage.create_if_absent(f"{prefix}{COMMIT}", digest(data).encode())
    assert created, "a fresh save id was committed before"


def _discard(storage: Storage, name: str, rank: int) -> None:
    """Give back the room that a failed save took, unless it was committed; what cannot be deleted is cleared later."""
    with contextlib.suppress(OSError, CheckpointError):
        if f"{name}/{COMMIT}" not in storage.list(f"{name}/"):
            own = [shard_name(rank), index_name(rank), *([MANIFEST] if rank == 0 else [])]
            storage.delete(f"{name}/{file}" for file in own)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("evershard", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
