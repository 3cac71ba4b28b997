"""`load`: all ranks choose a generation together, check that it is complete, and fill their pieces in place."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.collective import Team, as_team
from checkpointing.commit import as_storage
from checkpointing.errors import DamagedError, MismatchError, NotFoundError, first_few
from checkpointing.format import scalar_from_hex
from checkpointing.generations import candidates, read_manifest, scan
from checkpointing.geometry import Piece
from checkpointing.plan import check_complete, plan_load
from checkpointing.reader import GenerationReader
from checkpointing.storage import Storage

logger = logging.getLogger("checkpointing")


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
    `MismatchError` if a piece is not in the generation, or a stored tensor is in no rank's pieces; `only` (prefixes
    of names) loads less: other pieces stay as they are. After an error the pieces' tensors must not be used.
    """
    team, storage = as_team(group), as_storage(directory)
    wanted = [p for p in pieces if only is None or p.name.startswith(tuple(only))]
    names = team.together(lambda: _choices(storage, step, generation) if team.rank == 0 else [])[0]
    named = step is not None or generation is not None
    for name in names:
        try:
            return _load_one(team, storage, name, wanted, only)
        except (DamagedError, NotFoundError) as error:
            if named or name == names[-1]:
                raise DamagedError(
                    f"generation {name} in {storage} is damaged: {error}. "
                    + ("" if named else "No older sound generation is left. ")
                    + "The tensors passed to load must not be used."
                ) from error
            if team.rank == 0:
                logger.warning("generation %s is damaged and is passed over: %s", name, error)
    raise AssertionError("unreachable: _choices never returns an empty list")


def _choices(storage: Storage, step: int | None, generation: str | None) -> list[str]:
    """The generations to try, best first."""
    found = [g for g in scan(storage) if g.committed] if step is not None or generation else candidates(storage)
    if generation is not None:
        found = [g for g in found if g.name == generation]
    elif step is not None:
        # A step may have been saved again after a rollback: the newest save of it counts.
        found = sorted((g for g in found if g.step == step), key=lambda g: not g.abandoned, reverse=True)[:1]
    if not found:
        what = (
            f"generation {generation}" if generation else "generation" if step is None else f"generation of step {step}"
        )
        raise NotFoundError(f"there is no committed {what} in {storage}")
    for damaged in (g for g in found if g.damage and len(found) > 1):
        logger.warning("generation %s is damaged and is passed over: %s", damaged.name, damaged.damage)
    return [g.name for g in found]


def _load_one(
    team: Team, storage: Storage, name: str, pieces: Sequence[Piece], only: Sequence[str] | None
) -> dict[str, Any]:
    reader: GenerationReader | None = None

    def open_and_check() -> list[str]:
        nonlocal reader
        reader = GenerationReader(storage, read_manifest(storage, name))
        check_complete(pieces, reader.manifest.tensors)
        asked = {p.name for p in pieces}
        stored = reader.manifest.tensors
        return [n for n in stored if n not in asked and (only is None or n.startswith(tuple(only)))]

    unclaimed_by_rank = team.together(open_and_check)
    left_over = sorted(set(unclaimed_by_rank[0]).intersection(*unclaimed_by_rank[1:]))
    if left_over:
        raise MismatchError(
            f"the checkpoint holds {len(left_over)} tensors that nothing asks for: {first_few(left_over)}; "
            "pass `only` to load less than everything"
        )
    assert reader is not None
    opened = reader
    team.together(lambda: _fill(opened, pieces))
    return dict(opened.objects)


def _fill(reader: GenerationReader, pieces: Sequence[Piece]) -> None:
    reader.fill(plan_load(pieces, reader.indexes))
    scalars = reader.scalars
    for piece in pieces:
        if piece.global_shape == ():
            if piece.name not in scalars:
                raise DamagedError(f"{piece.name} has no value in any index")
            value = scalar_from_hex(scalars[piece.name], piece.tensor.dtype, piece.name)
            with torch.no_grad():
                piece.tensor.detach().copy_(value)
