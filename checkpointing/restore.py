"""`load`: all ranks choose a generation together, check that it is complete, and fill their pieces in place."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.collective import Team, as_team
from checkpointing.commit import as_storage
from checkpointing.errors import DamagedError, MismatchError, NotFoundError, VersionError, first_few
from checkpointing.format import scalar_from_hex
from checkpointing.generations import candidates, read_manifest, scan
from checkpointing.geometry import Piece
from checkpointing.plan import check_complete, check_nothing_left, layout_rows, plan_load
from checkpointing.reader import GenerationReader
from checkpointing.storage import Storage

logger = logging.getLogger("checkpointing")
_UNUSABLE = "The tensors passed to load must not be used."


def load(
    directory: str | os.PathLike[str] | Storage,
    pieces: Sequence[Piece],
    step: int | None = None,
    group: dist.ProcessGroup | Team | None = None,
    *,
    only: Sequence[str] | None = None,
    generation: str | None = None,
) -> dict[str, Any]:
    """Fill the pieces of all ranks from a generation, and return its objects. Collective.

    With neither `step` nor `generation` (a name) the newest sound generation is loaded: damage is logged as a
    warning and the next older one taken, by all ranks together. With one of them, damage raises `DamagedError`.
    `MismatchError` if a piece is not in the generation, or an element of a stored tensor in no rank's pieces; `only`
    (prefixes of names) loads less, and other pieces stay as they are. `VersionError` if a newer release wrote what
    would be chosen. After an error the pieces' tensors must not be used.
    """
    team, storage = as_team(group), as_storage(directory)
    tried: dict[str, str] = {}  # in vain, and why
    while True:
        # Listed anew each time: while it was read, the run may have deleted one and committed another.
        name = team.together(lambda: _choose(storage, step, generation, tried) if team.rank == 0 else "")[0]
        try:
            return _load_one(team, storage, name, pieces, only)
        except (DamagedError, NotFoundError) as error:
            if step is not None or generation is not None:
                raise DamagedError(f"generation {name} in {storage} is damaged: {error}. {_UNUSABLE}") from error
            if team.rank == 0:
                logger.warning("generation %s is damaged and is passed over: %s", name, error)
            tried[name] = str(error)


def _choose(storage: Storage, step: int | None, generation: str | None, tried: Mapping[str, str]) -> str:
    """The generation to load, or to load next after those that were tried in vain."""
    if generation is not None:
        if not any(g.name == generation and g.committed for g in scan(storage)):
            raise NotFoundError(f"there is no committed generation {generation} in {storage}")
        return generation
    if step is not None:
        return _choose_of_step(storage, step)
    found = candidates(storage)
    if not found:
        raise NotFoundError(f"there is no committed generation in {storage}")
    for other in found:
        if isinstance(other.damage, VersionError):
            raise other.damage
        if other.damage and other.name not in tried:
            logger.warning("generation %s is damaged and is passed over: %s", other.name, other.damage)
    if (best := next((g for g in found if g.sound and g.name not in tried), None)) is None:
        why = first_few([f"{g.name}: {tried.get(g.name, g.damage)}" for g in found], limit=3)
        raise DamagedError(f"every generation in {storage} is damaged ({why}). {_UNUSABLE}")
    return best.name


def _choose_of_step(storage: Storage, step: int) -> str:
    """The last save of a step. It may have been saved again after a rollback, which abandons the one before."""
    found = [g for g in scan(storage) if g.committed and g.step == step]
    found = [g for g in found if not g.abandoned] or found
    if not found:
        raise NotFoundError(f"there is no committed generation of step {step} in {storage}")
    if unreadable := next((g for g in found if g.manifest is None), None):
        raise DamagedError(
            f"generation {unreadable.name} in {storage} is damaged: {unreadable.damage}. "
            "It may be the last save of that step; name another one with `generation`."
        )
    return found[0].name


def _load_one(
    team: Team, storage: Storage, name: str, pieces: Sequence[Piece], only: Sequence[str] | None
) -> dict[str, Any]:
    reader: GenerationReader | None = None
    pieces = [p for p in pieces if only is None or p.name.startswith(tuple(only))]

    def open_and_check() -> list[Any]:
        nonlocal reader
        reader = GenerationReader(storage, read_manifest(storage, name))
        stored = reader.manifest.tensors
        _check_prefixes(only, [*stored, *(p.name for p in pieces)])
        check_complete(pieces, stored)
        return layout_rows(pieces) if only is None else []

    layouts = team.together(open_and_check)
    assert reader is not None
    opened = reader
    if only is None:
        check_nothing_left(layouts, opened.manifest.tensors)
    team.together(lambda: _fill(opened, pieces))
    return dict(opened.objects)


def _check_prefixes(only: Sequence[str] | None, names: Sequence[str]) -> None:
    if isinstance(only, str):
        raise MismatchError(f"only={only!r} is one string; give a list of prefixes, such as [{only!r}]")
    for prefix in only or ():
        if not any(name.startswith(prefix) for name in names):
            raise MismatchError(f"nothing in the checkpoint has a name that starts with {prefix!r}")


def _fill(reader: GenerationReader, pieces: Sequence[Piece]) -> None:
    reader.fill(plan_load(pieces, reader.stored))
    scalars = reader.scalars
    for piece in pieces:
        if piece.global_shape == ():
            if piece.name not in scalars:
                raise DamagedError(f"{piece.name} has no value in any index")
            value = scalar_from_hex(scalars[piece.name], piece.tensor.dtype, piece.name)
            with torch.no_grad():
                piece.tensor.detach().copy_(value)
