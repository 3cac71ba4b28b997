"""`save`: every rank prepares, then rank 0 commits. Nothing exists until COMMIT does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from checkpointing.collective import Team, as_team
from checkpointing.errors import LayoutError
from checkpointing.format import COMMIT, MANIFEST, Manifest, Writer, digest, encode_manifest, generation_name
from checkpointing.generations import newest
from checkpointing.geometry import Piece
from checkpointing.plan import layout_rows, plan_save
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
    incarnation: int = 0,
) -> str:
    """Save the pieces of all ranks as a new generation, and return its name. Collective; synchronous.

    `objects` are JSON values, rank 0's are kept. The generation is durable when this returns. If any rank fails,
    all raise with its reason and the previous generation stays the newest. `incarnation` counts the run's resumes:
    the newest generation is the greatest by (incarnation, step).
    """
    team, storage = as_team(group), as_storage(directory)
    layouts = team.together(lambda: _describe(pieces, objects or {}))
    plan = plan_save(layouts)
    save_id, parent = team.together(lambda: _begin(storage) if team.rank == 0 else None)[0]
    name = generation_name(step, save_id)

    def prepare() -> dict[str, Any] | None:
        writer = write_shard(storage, name, plan, pieces, team.rank, save_id, (objects or {}) if team.rank == 0 else {})
        return asdict(writer) if writer else None

    prepared = [Writer(**record) for record in team.together(prepare) if record is not None]

    def commit() -> None:
        if team.rank == 0:
            manifest = Manifest(
                step=step,
                save_id=save_id,
                parent=parent,
                run_id=run_id,
                incarnation=incarnation,
                created=time.time(),
                world_size=team.size,
                versions=_versions(),
                writers=prepared,
                tensors=plan.tensors,
            )
            _commit(storage, manifest)

    team.together(commit)
    return name


def as_storage(directory: str | os.PathLike[str] | Storage) -> Storage:
    return FileStorage(directory) if isinstance(directory, str | os.PathLike) else directory


def _describe(pieces: Sequence[Piece], objects: dict[str, Any]) -> list[Any]:
    """This rank's layout for the others; what it cannot store is refused before anything is written."""
    try:
        json.dumps(objects, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LayoutError(f"objects must be plain finite JSON values: {error}") from None
    return layout_rows(pieces)


def _begin(storage: Storage) -> tuple[str, str]:
    last = newest(storage)
    return secrets.token_hex(16), last.manifest.save_id if last and last.manifest else ""


def _commit(storage: Storage, manifest: Manifest) -> None:
    """Every shard and index is durable by now. COMMIT comes last, after the manifest that it vouches for."""
    data = encode_manifest(manifest)
    storage.put(f"{manifest.generation}/{MANIFEST}", [data])
    created = storage.create_if_absent(f"{manifest.generation}/{COMMIT}", digest(data).encode())
    assert created, "a fresh save id was committed before"


def _versions() -> dict[str, str]:
    found = {}
    for package in ("evershard", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
