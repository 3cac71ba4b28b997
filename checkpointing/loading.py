"""`load`: all ranks choose a generation together, check that it is complete, and fill their pieces in place."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from checkpointing.collective import Team, as_team
from checkpointing.completeness import check_complete, check_external, check_targets, without_other_names
from checkpointing.errors import DamagedError, LayoutError, MismatchError, NotFoundError, VersionError, first_few
from checkpointing.format import Manifest
from checkpointing.generations import candidates, check_readable, read_manifest, scan
from checkpointing.geometry import External, Piece, parts_of
from checkpointing.lease import hold
from checkpointing.memory.mapped import MappedStorage
from checkpointing.place import CHECKPOINTS, Place
from checkpointing.plan import Row, layout_rows, split
from checkpointing.planner import agree_on_completeness
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage, Storage
from checkpointing.stores import open_storage
from checkpointing.tensors import tensor_bytes
from checkpointing.writer import DEFAULT_BUDGET, LEAST_BUDGET

logger = logging.getLogger("checkpointing")
_UNUSABLE = "The tensors passed to load must not be used."


Directory = str | os.PathLike[str] | Storage | Place


def load(
    directory: Directory | Sequence[Directory],
    pieces: Sequence[Piece | External] | Callable[[Manifest], Sequence[Piece | External]],
    step: int | None = None,
    group: dist.ProcessGroup | Team | None = None,
    *,
    only: Sequence[str] | None = None,
    generation: str | None = None,
    cast: bool = False,
    memory_budget: int = DEFAULT_BUDGET,
    chosen: Callable[[Storage, str], None] | None = None,
) -> dict[str, Any]:
    """Fill the pieces of all ranks from a generation, and return its objects. Collective.

    With neither `step` nor `generation` (a name) the newest sound generation is loaded: damage is logged as a
    warning and the next older one taken, by all ranks together. With one of them, damage raises `DamagedError`.
    `UnreadableError` where the storage goes on failing: nothing is passed over for that, and a later call may succeed.
    `MismatchError` if a piece is not in the generation, or an element of a stored tensor in no rank's pieces; `only`
    (prefixes of names) loads less, and other pieces stay as they are. A piece may be of another dtype where that keeps
    every value; `cast` rounds. Tensors that the generation calls external must be declared with the same content.
    `VersionError` if a newer release wrote what would be chosen. After an error the pieces' tensors must not be used.
    `memory_budget` bounds the bytes on their way from storage. What is being loaded is held: retention leaves it.
    A `Place`, as `find` gives it, is taken for its storage, and for the generation that it names. Of several
    directories, such as memory and a disk, the newest over all of them is taken, and the first of those that
    hold it. `chosen` is called with the storage and the name of what was loaded. Where the shapes of pieces follow from
    what is loaded, `pieces` is a function of its manifest, which may use the group; it is called for each one tried.
    """
    team = as_team(group)
    given: Sequence[Any] = directory if isinstance(directory, list | tuple) else [directory]
    storages = [one.storage if isinstance(one, Place) else open_storage(one) for one in given]
    if generation is None and step is None:
        generation = next((one.named for one in given if isinstance(one, Place)), None)
    asked = (step, generation, only, cast, memory_budget)
    wanted = _agree(team, () if callable(pieces) else pieces, *asked)
    tried: dict[tuple[int, str], str] = {}  # in vain, and why; by the number of the storage
    while True:
        with ExitStack() as held:

            def choose() -> tuple[int, str]:
                # Listed anew each time: while it was read, the run may have deleted one and committed another.
                number, name = _choose(storages, step, generation, tried)
                held.enter_context(hold(storages[number], name))
                return number, name

            number, name = team.together(lambda: choose() if team.rank == 0 else None, long=True)[0]
            storage = storages[number]
            if team.rank and isinstance(storage, MappedStorage) and storage.root.is_dir():  # each node has its own
                held.enter_context(hold(storage, name))
            try:
                if callable(pieces):
                    manifest = _read_together(team, storage, name)
                    wanted = _agree(team, pieces(manifest), *asked)
                objects = _load_one(team, storage, name, wanted, memory_budget)
            except (DamagedError, NotFoundError) as error:
                if (step is not None or generation is not None) and len(storages) == 1:
                    raise DamagedError(f"generation {name} in {storage} is damaged: {error}. {_UNUSABLE}") from error
                if team.rank == 0:
                    logger.warning("generation %s in %s is damaged and is passed over: %s", name, storage, error)
                tried[number, name] = str(error)
                continue
            if chosen is not None:
                chosen(storage, name)
            return objects


def _read_together(team: Team, storage: Storage, name: str) -> Manifest:
    """All ranks read it, or all fail."""
    found: list[Manifest] = []
    team.together(lambda: found.append(read_manifest(storage, name)), long=True)
    return found[0]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The request of a load on this rank, without what `only` leaves out."""

    pieces: list[Piece]
    external: list[External]
    only: Sequence[str] | None
    cast: bool


def _agree(
    team: Team,
    given: Sequence[Piece | External],
    step: int | None,
    generation: str | None,
    only: Sequence[str] | None,
    cast: bool,
    budget: int,
) -> _Wanted:
    """Agree on a load: this rank's request, after all have found that theirs are alike."""
    wanted: _Wanted | None = None

    def look() -> list[str]:
        nonlocal wanted
        if isinstance(only, str):
            raise MismatchError(f"only={only!r} is one string; give a list of prefixes, such as [{only!r}]")
        if type(budget) is not int or budget < LEAST_BUDGET:
            raise LayoutError(f"memory_budget {budget!r}: at least {LEAST_BUDGET} bytes are needed to go on")
        prefixes = ("",) if only is None else tuple(only)
        pieces, external = split(given)
        kept = [piece for piece in pieces if piece.name.startswith(prefixes)]
        check_targets(kept)
        wanted = _Wanted(kept, [one for one in external if one.name.startswith(prefixes)], only, cast)
        return [f"step={step}", f"generation={generation}", f"only={only}", f"cast={cast}"]

    told = team.together(look)
    for rank, others in enumerate(told):
        for here, first in zip(others, told[0], strict=True):
            if here != first:
                raise LayoutError(f"rank {rank} loads with {here}, rank 0 with {first}; all ranks load alike")
    assert wanted is not None
    return wanted


def _choose(
    storages: Sequence[Storage], step: int | None, generation: str | None, tried: Mapping[tuple[int, str], str]
) -> tuple[int, str]:
    """The generation to load, or to load next after those that were tried in vain, and the number of its storage."""
    where = " and ".join(map(str, storages))
    if generation is not None or step is not None:
        return _choose_named(storages, step, generation, tried, where)
    found = [(number, g) for number, storage in enumerate(storages) for g in candidates(storage)]
    if not found:
        raise NotFoundError(f"there is no committed generation in {where}{_of_a_run(storages)}")
    check_readable(generation for _, generation in found)
    for number, other in found:
        if isinstance(other.damage, VersionError):
            raise other.damage
        if other.damage and (number, other.name) not in tried:
            logger.warning("generation %s is damaged and is passed over: %s", other.name, other.damage)
    sound = [(number, g) for number, g in found if g.sound and (number, g.name) not in tried]
    if not sound:
        why = first_few([f"{g.name}: {tried.get((number, g.name), g.damage)}" for number, g in found], limit=3)
        raise DamagedError(f"every generation in {where} is damaged ({why}). {_UNUSABLE}")
    number, best = max(sound, key=lambda one: (one[1].order, one[1].name, -one[0]))
    return number, best.name


def _of_a_run(storages: Sequence[Storage]) -> str:
    """Where the generations of a run's directory are, of which `load` is given the one above."""
    below = [one.root / CHECKPOINTS for one in storages if isinstance(one, FileStorage)]
    found = next((directory for directory in below if directory.is_dir()), None)
    return "" if found is None else f": that is a run, whose generations are in {found}, as find() tells"


def _choose_named(
    storages: Sequence[Storage],
    step: int | None,
    generation: str | None,
    tried: Mapping[tuple[int, str], str],
    where: str,
) -> tuple[int, str]:
    """One that was asked for, from the first storage that has it and was not tried in vain."""
    reason: Exception = NotFoundError(f"there is no committed generation {generation} in {where}")
    for number, storage in enumerate(storages):
        try:
            name = _choose_of_step(storage, step) if step is not None else str(generation)
        except (NotFoundError, DamagedError) as error:
            reason = error
            continue
        if step is None and not any(g.name == name and g.committed for g in scan(storage)):
            continue
        if (number, name) not in tried:
            return number, name
        reason = DamagedError(f"generation {name} in {storage} is damaged: {tried[number, name]}. {_UNUSABLE}")
    raise reason


def _choose_of_step(storage: Storage, step: int) -> str:
    """The last save of a step. It may have been saved again after a rollback, which abandons the one before."""
    found = [g for g in scan(storage) if g.committed and g.step == step]
    found = [g for g in found if not g.abandoned] or found
    check_readable(found)
    if not found:
        raise NotFoundError(f"there is no committed generation of step {step} in {storage}")
    if unreadable := next((g for g in found if g.manifest is None), None):
        raise DamagedError(
            f"generation {unreadable.name} in {storage} is damaged: {unreadable.damage}. "
            "It may be the last save of that step; name another one with `generation`."
        )
    return found[0].name


def _load_one(team: Team, storage: Storage, name: str, wanted: _Wanted, budget: int) -> dict[str, Any]:
    reader: GenerationReader | None = None
    pieces: list[Piece] = []
    rows: list[Row] = []

    def open_and_check() -> None:
        nonlocal reader, pieces, rows
        reader = GenerationReader(storage, read_manifest(storage, name), budget)
        manifest = reader.manifest
        stored = [*manifest.tensors, *manifest.aliases, *manifest.external]
        _check_prefixes(wanted.only, [*stored, *(p.name for p in wanted.pieces)])
        check_external(wanted.external, manifest, all_of_them=wanted.only is None)
        pieces = without_other_names(wanted.pieces, manifest)
        check_complete(pieces, manifest, wanted.cast)
        rows = layout_rows(pieces) if wanted.only is None else []

    team.together(open_and_check, long=True)
    assert reader is not None
    opened = reader
    if wanted.only is None:
        agree_on_completeness(team, rows, opened.manifest)
    objects: dict[str, Any] = {}

    def fill() -> None:
        _fill(opened, pieces)
        objects.update(opened.objects)  # read here, where a failure is told to all

    team.together(fill, long=True)
    return objects


def _check_prefixes(only: Sequence[str] | None, names: Sequence[str]) -> None:
    for prefix in only or ():
        if not any(name.startswith(prefix) for name in names):
            raise MismatchError(f"nothing in the checkpoint has a name that starts with {prefix!r}")


def _fill(reader: GenerationReader, pieces: Sequence[Piece]) -> None:
    """Each memory once. Where two tensors of the checkpoint are one here, the second must equal the first."""
    first: dict[tuple[object, ...], Piece] = {}
    own, again = [], []
    for piece in pieces:
        stored = reader.manifest.stored_name(piece.name)
        named = piece if stored == piece.name else replace(piece, name=stored)
        same = first.setdefault(piece.memory, named) if piece.tensor.numel() else named
        if same is named:
            own.append(named)
        elif (same.name, same.divisor) != (stored, piece.divisor):
            again.append((piece, same, named))
    reader.load(own)
    for piece, same, named in again:
        for part in parts_of(named, COMPARED_BYTES):
            copy = replace(part, tensor=torch.empty_like(part.tensor))
            reader.load([copy])
            if tensor_bytes(copy.tensor) != tensor_bytes(part.tensor):
                raise MismatchError(
                    f"{piece.name} and {same.name} are tied here, one tensor with two names, and hold different values "
                    f"in {reader.manifest.generation}: load them into a model that keeps them apart"
                )


COMPARED_BYTES = 16 * 1024 * 1024  # of a tensor that is tied here and was not when it was saved, at a time
