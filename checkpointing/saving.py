"""`save`: every rank prepares, then rank 0 commits. Nothing exists until COMMIT does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache
from math import isfinite
from typing import Any

import torch.distributed as dist

from checkpointing import committing, replicas
from checkpointing.collective import Team, as_team
from checkpointing.errors import CheckpointError, LayoutError, LostError, first_few
from checkpointing.format import (
    COMMIT,
    MANIFEST,
    ExternalTensor,
    Manifest,
    Writer,
    digest,
    flaw_of_name,
    generation_name,
    index_name,
    shard_name,
)
from checkpointing.generations import check_readable, scan
from checkpointing.geometry import External, Piece
from checkpointing.lease import Hold
from checkpointing.plan import RankPlan, Row, layout_rows, split
from checkpointing.planner import agree_on_plan
from checkpointing.storage import Storage
from checkpointing.stores import open_storage
from checkpointing.tensors import DTYPE_NAMES
from checkpointing.writer import DEFAULT_BUDGET, LEAST_BUDGET, write_shard


def save(
    directory: str | os.PathLike[str] | Storage,
    step: int,
    pieces: Sequence[Piece | External],
    objects: dict[str, Any] | None = None,
    group: dist.ProcessGroup | Team | None = None,
    *,
    run_id: str = "",
    incarnation: int | None = None,
    metrics: dict[str, float] | None = None,
    check_replicas: bool = True,
    guard: Callable[[], None] | None = None,
    memory_budget: int = DEFAULT_BUDGET,
) -> str:
    """Save the pieces of all ranks as a new generation, and return its name. Collective; synchronous.

    `objects` are JSON values, rank 0's are kept. The generation is durable when this returns. If any rank fails, all
    raise with its reason and the previous generation stays the newest; only where COMMIT was written and its directory
    could not be synced, the new one is there as well, though perhaps not durable. `incarnation` counts resumes of the
    run: the newest generation is the greatest by (incarnation, step), and of one step the one saved last; by default it
    is that of the newest generation there. `metrics` are finite numbers, rank 0's, for retention to choose by.

    Of a box that several ranks hold one rank's copy is saved; `check_replicas` compares them first, at the price of
    reading such pieces once more (`ReplicaError` names the ranks). `guard` is called on rank 0 right before the commit,
    and stops it by raising. `memory_budget` bounds the bytes of copies beside the state.
    """
    team, storage = as_team(group), open_storage(directory)
    objects, metrics = {} if objects is None else objects, {} if metrics is None else metrics

    plan, mine = agree_to_save(
        team,
        pieces,
        lambda: check_save(step, run_id, incarnation, objects, metrics, memory_budget),
        [f"step {step}", f"check_replicas={check_replicas}"],
    )
    if check_replicas:
        replicas.check_replicas(team, plan, mine.pieces)
    written = replicas.averaged(team, plan, mine.pieces)

    def begin() -> dict[str, Any] | None:
        return asdict(begin_save(storage, incarnation)) if team.rank == 0 else None

    start = SaveStart(**team.together(begin, long=True)[0])
    name = generation_name(step, start.save_id)

    def prepare() -> dict[str, Any] | None:
        own = objects if team.rank == 0 else {}
        writer = write_shard(storage, name, plan, written, team.rank, start.save_id, own, memory_budget)
        return asdict(writer) if writer else None

    def commit(writers: list[Writer]) -> None:
        manifest = Manifest(
            step=step,
            run_id=run_id,
            created=time.time(),
            world_size=team.size,
            versions=versions(),
            metrics=metrics,
            writers=writers,
            tensors=plan.tensors,
            aliases=plan.aliases,
            external=mine.external,
            **asdict(start),
        )
        committing.commit(storage, manifest, guard)

    def hold() -> None:
        """Whoever clears up sees by it that what is not committed yet is not dead."""
        if team.rank == 0:
            opened.enter_context(Hold(storage, name, "write"))

    with ExitStack() as opened:
        team.together(hold, long=True)
        try:
            prepared = [Writer.of(record) for record in team.together(prepare, long=True) if record is not None]
            team.together(lambda: commit(prepared) if team.rank == 0 else None, long=True)
        except LostError:
            raise  # rank 0 may commit what this rank wrote; if not, it is cleared away as a leftover
        except Exception:
            _discard(storage, name, team.rank)
            raise
    return name


@dataclass(frozen=True, slots=True)
class Mine:
    """The tensors and objects that this rank saves, found fit to be saved."""

    pieces: list[Piece]
    external: dict[str, ExternalTensor]
    rows: list[Row]

    @staticmethod
    def of(given: Sequence[Piece | External]) -> Mine:
        pieces, external = split(given)
        return Mine(pieces, _declared(external), layout_rows(pieces))


def agree_to_save(
    team: Team, given: Sequence[Piece | External], check: Callable[[], None], alike: Sequence[str]
) -> tuple[RankPlan, Mine]:
    """Agree on a save, after each rank has found that it can save its part. Collective.

    `check` raises where it cannot; `alike` is what all ranks must say. The plan is the same object while no layout
    changes.
    """
    mine: Mine | None = None

    def describe() -> list[Any]:
        nonlocal mine
        check()
        mine = Mine.of(given)
        declared = json.dumps({name: asdict(tensor) for name, tensor in mine.external.items()})
        return [*alike, digest(declared.encode())]

    told = team.together(describe)
    assert mine is not None
    for rank, others in enumerate(told):
        for here, first in zip(others[:-1], told[0][:-1], strict=True):
            if here != first:
                raise LayoutError(f"rank {rank} saves with {here}, rank 0 with {first}")
        if others != told[0]:
            raise LayoutError(f"rank {rank} and rank 0 declare different external tensors; every rank declares all")
    plan = agree_on_plan(team, mine.rows)
    if both := sorted(mine.external.keys() & (plan.tensors.keys() | plan.aliases.keys())):
        raise LayoutError(f"declared external, and held as well: {first_few(both)}")
    return plan, mine


def check_save(
    step: int, run_id: str, incarnation: int | None, objects: Any, metrics: Any, budget: int = DEFAULT_BUDGET
) -> None:
    """Refuse, before anything is written, a save that could not be read again."""
    for name, value in (("step", step), ("incarnation", 0 if incarnation is None else incarnation)):
        if type(value) is not int or not 0 <= value < 2**62:
            raise LayoutError(f"{name} {value!r} cannot be saved: it is counted from 0, as an int")
    if not isinstance(run_id, str):
        raise LayoutError(f"run_id {run_id!r} is no string")
    if type(budget) is not int or budget < LEAST_BUDGET:
        raise LayoutError(f"memory_budget {budget!r}: at least {LEAST_BUDGET} bytes are needed to go on")
    if not isinstance(metrics, dict) or not isinstance(objects, dict):
        raise LayoutError("objects and metrics are dicts")
    if bad := [str(name) for name, value in metrics.items() if type(value) not in (int, float) or not isfinite(value)]:
        raise LayoutError(f"metrics must be finite numbers, and these are not: {first_few(bad)}")
    if any(abs(value) >= 2**62 and type(value) is int for value in metrics.values()):
        raise LayoutError("metrics must be numbers that a float can hold")
    try:
        same = json.loads(json.dumps(objects, allow_nan=False)) == objects
    except (TypeError, ValueError, RecursionError) as error:
        raise LayoutError(f"objects must be plain finite JSON values: {error}") from None
    if not same:
        raise LayoutError("objects must be plain JSON values: tuples and keys that are no strings come back changed")


def _declared(given: Sequence[External]) -> dict[str, ExternalTensor]:
    external: dict[str, ExternalTensor] = {}
    for one in given:
        if flaw := flaw_of_name(one.name):
            raise LayoutError(flaw)
        if one.dtype not in DTYPE_NAMES or one.name in external:
            raise LayoutError(f"{one.name}: declared external twice, or of a dtype without a safetensors name")
        external[one.name] = ExternalTensor(DTYPE_NAMES[one.dtype], one.shape, one.source, one.sha256)
    return dict(sorted(external.items()))


@dataclass(frozen=True, slots=True)
class SaveStart:
    """The decisions of rank 0 for all when a save begins."""

    save_id: str
    parent: str
    incarnation: int
    serial: int


def begin_save(storage: Storage, incarnation: int | None) -> SaveStart:
    found = scan(storage, remembered=True)
    parent = next((g.manifest for g in found if g.sound and not g.abandoned), None)
    if incarnation is None:
        check_readable(g for g in found if g.committed and not g.abandoned)
        incarnation = parent.incarnation if parent else 0
    serial = 1 + max((g.manifest.serial for g in found if g.manifest), default=0)
    return SaveStart(secrets.token_hex(16), parent.save_id if parent else "", incarnation, serial)


def _discard(storage: Storage, name: str, rank: int) -> None:
    """Give back the room that a failed save took, unless it was committed; what cannot be deleted is cleared later."""
    with suppress(OSError, CheckpointError):
        if f"{name}/{COMMIT}" not in storage.list(f"{name}/"):
            own = [shard_name(rank), index_name(rank), *([MANIFEST] if rank == 0 else [])]
            storage.delete(f"{name}/{file}" for file in own)


def versions() -> dict[str, str]:
    """Releases of what writes a generation."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in ("evershard", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
