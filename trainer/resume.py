"""Where a run starts: from scratch, or from which generation.

Nothing here writes, until `turn_away_from` marks what a run has left behind.
"""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from checkpointing import (
    DEFAULT_MEMORY,
    IMPORTED,
    CheckpointError,
    Generation,
    Manifest,
    MappedStorage,
    NotFoundError,
    Place,
    Storage,
    UnreadableError,
    VersionError,
    abandon,
    candidates,
    describe,
    find,
    is_path,
    open_storage,
    parameter_names,
    read_index,
    same_place,
    scan,
    who_wrote,
    why_not_private,
)
from checkpointing.errors import first_few
from checkpointing.small_files import read_small, replace_file, sync_directory
from trainer.allowed_changes import check_state
from trainer.errors import Refused, TrainingFailed
from trainer.identity import came_from, identify, recorded
from trainer.methods import build, method_of
from trainer.options.config import Config, is_free
from trainer.track.history import History

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The decision: which step is already done, where its state lies, and as which incarnation the run goes on."""

    step: int = 0
    directories: list[str] = field(default_factory=list)  # of generations, memory before disks; none from scratch
    memory: str | None = None  # that of them which is in memory
    generation: str | None = None  # a name where the user named one; None for the newest sound one
    own: bool = False  # whether that is the run's own directory, and not another run's
    incarnation: int = 1
    state: dict[str, Any] = field(default_factory=dict)  # the trainer's objects in that generation
    lines: list[str] = field(default_factory=list)  # for the plan
    altered: bool = False  # whether what comes after that step may differ from what was computed before
    sizes: Mapping[str, int] | None = None  # how much of each layer trains there, where a method counts it


def decide(config: Config, fingerprint: str, model: nn.Module) -> Start:
    """Find where to start and check that this configuration may. `Refused` says which override to type.

    `fingerprint` is the training data's; `model` may be on the device meta.
    """
    tiers = own_tiers(config)
    past = History.of(Path(config.run.dir))
    seen = [g.manifest.incarnation for tier in tiers for g in scan(tier) if g.manifest]  # of starts that saved
    incarnation = 1 + max(past.incarnation, *seen, 0)
    if config.resume == "none":
        return Start(incarnation=incarnation, lines=["from scratch (resume=none)"])
    named: str | None = None
    notes: list[str] = []
    if config.resume == "auto":
        found, notes = _own_candidates(tiers, past.run_ids)
        if not found:
            if not scan(open_storage(config.checkpoint.dir)):  # not even one that was abandoned
                _check_nothing_was_saved(config, past)
            return Start(incarnation=incarnation, lines=["from scratch", *_what_memory_held(past), *notes])
    else:
        place = _find(config.resume)
        named, found = place.named, [(place.storage, generation) for generation in place.candidates]
    storage, generation, manifest, state, passed_over = _newest_readable(found)
    passed_over = notes + passed_over
    changes = {} if IMPORTED in state else check_state(config, state, fingerprint, model)
    sizes = method_of(config).shapes(manifest)
    _check_model(f"{storage}/{generation.name}", manifest, _shapes(config, sizes, model))
    is_own = any(same_place(storage, tier) for tier in tiers)
    lines = [
        f"{storage}/{generation.name}: step {generation.step} of {config.train.steps} is done, "
        f"saved by {manifest.world_size} process{'' if manifest.world_size == 1 else 'es'}"
    ]
    if IMPORTED in state:
        lines = [lines[0].partition(", saved by")[0] + f", imported from {state[IMPORTED]['kind']}"]
        lines.append("its settings and data are not known here: give those it was trained with")
        if not state[IMPORTED]["optimizer"]:
            lines.append("the optimizer's state begins at zero")
    if is_own and (other := came_from(Path(config.run.dir))):
        lines.append(
            f"copied or moved from {other}: it goes on as another run, with memory and a tracker's id of its own"
        )
    lines += passed_over
    lines += [
        f"changed since: {key} was {was}, is {now}"
        for key, (was, now) in changes.items()
        if not key.startswith(
            ("run.", "resume", "dry_run", "launch", "method.lr", "method.weight_decay")
        )  # of the optimizer's
    ]
    if "train.steps" in changes:
        lines.append("the learning rate follows the new train.steps from here on")
    incarnation = max(incarnation, manifest.incarnation + 1)
    directories = [str(tier) for tier in tiers if any(tier is other for other, _ in found)] or [str(storage)]
    memory = next((str(tier) for tier, _ in found if isinstance(tier, MappedStorage)), None)
    altered = any(not is_free(config, key) for key in changes)
    return Start(generation.step, directories, memory, named, is_own, incarnation, state, lines, altered, sizes)


def _shapes(config: Config, sizes: Mapping[str, int] | None, model: nn.Module) -> nn.Module:
    """The model as a checkpoint has it, whose method may have trained other sizes."""
    return model if sizes is None else build(config, "meta", sizes)


def own_tiers(config: Config) -> list[Storage]:
    """Where the run's own generations lie: in memory first, where it has any, and durably."""
    memory, durable = own_memory(config), open_storage(config.checkpoint.dir)
    return [durable] if memory is None else [memory, durable]


def own_memory(config: Config) -> MappedStorage | None:
    """The run's generations in this node's memory. A directory that others may write is not even looked at."""
    directory = memory_directory(config)
    if directory is None or not directory.is_dir():
        return None
    if why := why_not_private(directory):
        logger.warning("passing over what is in memory: %s", why)
        return None
    return MappedStorage(directory)


MEMORY_ID = "memory-id"  # in the run directory: with it goes the run's memory
_MEMORY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}-[0-9a-f]{12}")


def memory_directory(config: Config) -> Path | None:
    """The run's directory in memory, on every node; None where the run has none yet, or what it says is none of ours.

    The memory of the run that this directory is a copy of belongs to that one.
    """
    run_dir = Path(config.run.dir)
    try:
        own = read_small(run_dir / MEMORY_ID).decode("ascii", "replace").strip()
    except NotFoundError:
        return None
    if not _MEMORY_NAME.fullmatch(own) or came_from(run_dir):
        return None
    return Path(config.checkpoint.memory.dir or DEFAULT_MEMORY).resolve() / own


def make_memory_directory(config: Config) -> Path:
    """Name the run's directory in memory, where it has none yet. Rank 0 calls this."""
    if (found := memory_directory(config)) is None:
        if came_from(Path(config.run.dir)):
            become_itself(config, False, None)
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", config.run.name).strip(".-")[:40]
        replace_file(Path(config.run.dir) / MEMORY_ID, f"{name or 'run'}-{uuid.uuid4().hex[:12]}\n".encode())
        found = memory_directory(config)
    assert found is not None
    return found


def become_itself(config: Config, own: bool, saved: str | None) -> str:
    """The run's id, recorded together with where the run lies. For rank 0, under its leases.

    It stays where the run goes on from its `own` state, which was `saved` under an id; a run that begins has a new one,
    and so has a copy. That one lets go of the other run's memory first: cut short, it is still a copy.
    """
    run_dir, known = Path(config.run.dir), recorded(Path(config.run.dir))
    if came_from(run_dir):
        (run_dir / MEMORY_ID).unlink(missing_ok=True)
        sync_directory(run_dir)
        return identify(run_dir, None)
    return identify(run_dir, None if not own else saved if known is None else known.run_id)


def _own_candidates(tiers: list[Storage], known: Set[str]) -> tuple[list[tuple[Storage, Generation]], list[str]]:
    """The run's committed generations over all tiers, newest first; and what is said of those that are not its own."""
    found, notes = [], []
    for number, tier in enumerate(tiers):
        here = candidates(tier)
        strangers = [g.name for g in here if g.manifest and g.manifest.run_id not in known]
        if isinstance(tier, MappedStorage) and strangers:
            notes.append(f"passing over what is in memory: {first_few(strangers)} in {tier} is of another run")
        else:
            found += [(-number, tier, generation) for generation in here]
    found.sort(key=lambda one: (one[2].order, one[2].name, one[0]), reverse=True)
    return [(tier, generation) for _, tier, generation in found], notes


def turn_away_from(tiers: Sequence[Storage], start: Start, loaded_step: int) -> list[str]:
    """Mark the run's own generations that are newer than where it goes on, so that they are never chosen again.

    Memory before the disk, on every node its own: a flush that is under way looks for the mark in memory. What has not
    been committed is marked as well: a keeper that this node knows nothing of may be about to. Not those that cannot be
    read: whose they are is not known. Returns the names of those that were committed.
    """
    names = []
    for tier in tiers:
        abandon(tier, [g for g in scan(tier) if not g.committed and (not start.own or g.step > loaded_step)])
        newer = [g for g in candidates(tier) if g.manifest and (not start.own or g.step > loaded_step)]
        abandon(tier, newer)
        names += [g.name for g in newer if g.name not in names]
    return names


def _find(path: str) -> Place:
    """Find the generations of resume=<path>. `Refused` where nothing there was committed."""
    if is_path(path) and not Path(path).is_dir():
        raise Refused(
            f"resume={path} is not a directory. Give a run, its checkpoints, or one generation; or resume=auto."
        )
    try:
        open_storage(path)
    except CheckpointError as error:
        raise Refused(f"resume={error} Type --config-dir DIRECTORY with the one that has the store.") from None
    with contextlib.suppress(NotFoundError):
        if (place := find(path)).candidates:
            return place
    if is_path(path) and (who := who_wrote(Path(path))) is not None:
        raise Refused(
            f"resume={path} is a checkpoint of {who}. If you know where it comes from, type `python -m checkpointing "
            f"import {path} DIR --trust-pickle`, and then resume=DIR."
        )
    raise Refused(
        f"resume={path} holds no committed generation. `python -m checkpointing ls {path}` shows what is there."
    )


def _what_memory_held(past: History) -> list[str]:
    """A note on a run that had snapshots in memory and nothing else, and has lost them."""
    if past.in_memory is None:
        return []
    return [f"snapshots up to step {past.in_memory} were in memory, which is gone, and none was durable"]


def _check_nothing_was_saved(config: Config, past: History) -> None:
    """A run that did commit must not start over because its checkpoints are out of sight, as after a failed mount."""
    if past.committed:
        raise Refused(
            f"{config.run.dir} has saved checkpoints before, and {config.checkpoint.dir} holds none. "
            "Put them back, or type resume=none to start over."
        )


def _newest_readable(
    found: list[tuple[Storage, Generation]],
) -> tuple[Storage, Generation, Manifest, dict[str, Any], list[str]]:
    """The first that can be read, the trainer's state in it, and what to say about those before it."""
    for _, generation in found:
        if isinstance(generation.damage, UnreadableError):
            raise cannot_read(generation.damage) from generation.damage
    if newer := next((g for _, g in found if isinstance(g.damage, VersionError)), None):
        raise Refused(f"{newer.damage}. Or type resume=GENERATION to take another one.")
    # Where an unreadable one stands in the order is not known.
    passed_over = [f"passing over {g.name} in {storage}: {g.damage}" for storage, g in found if g.damage]
    for storage, generation in found:
        if generation.manifest is not None and generation.sound:
            try:
                state = _trainer_state(storage, generation, generation.manifest)
            except UnreadableError as error:
                raise cannot_read(error) from error
            except CheckpointError as error:
                passed_over.append(f"passing over {generation.name} in {storage}: {error}")
            else:
                return storage, generation, generation.manifest, state, passed_over
    durable = found[-1][0]
    raise Refused(
        f"Every generation in {durable} is damaged ({'; '.join(passed_over)}). "
        f"`python -m checkpointing verify {durable}` says more. Type resume=none to start over; nothing is deleted."
    )


def cannot_read(error: UnreadableError) -> TrainingFailed:
    """A checkpoint that may be sound is not given up for storage that fails."""
    return TrainingFailed(
        f"The run cannot go on now: {error}. That says nothing of the checkpoint, so none is passed over for it. Run "
        "the same command again when it can be read, or type resume=GENERATION to go on from an older one."
    )


def _trainer_state(storage: Storage, generation: Generation, manifest: Manifest) -> dict[str, Any]:
    state = trainer_state(read_index(storage, manifest, 0).objects)
    needed = (
        {"step"} if isinstance(state, dict) and IMPORTED in state else {"config", "fingerprint", "architecture", "step"}
    )
    if not isinstance(state, dict) or not needed <= state.keys():
        raise Refused(
            f"The checkpoint {storage}/{generation.name} was not written by this trainer, so it cannot go on from it."
        )
    return state


def trainer_state(objects: dict[str, Any]) -> Any:
    """The trainer's own state; of a checkpoint of another library which step is done, and whence it came."""
    if isinstance(imported := objects.get(IMPORTED), dict):
        return {"step": imported["step"], IMPORTED: imported}
    return objects.get("trainer")


def _check_model(name: str, manifest: Manifest, model: nn.Module) -> None:
    """Refuse a checkpoint of another model before any process group starts."""
    here = {piece.name: piece.global_shape for piece in describe(model)}
    stored = {name: t.shape for name, t in manifest.tensors.items()}
    stored |= {name: t.shape for name, t in manifest.external.items()}
    stored |= {alias: stored[name] for alias, name in manifest.aliases.items()}
    there = {name: shape for name, shape in stored.items() if name.startswith(("model/", "buffer/"))}
    # Other libraries store a tied tensor under one of its names.
    known = {id(parameter) for name, parameter in parameter_names(model).items() if f"model/{name}" in there}
    tied = {f"model/{name}" for name, parameter in parameter_names(model).items() if id(parameter) in known}
    wrong = []
    if missing := sorted(here.keys() - there.keys() - tied):
        wrong.append(f"it lacks {len(missing)} of this model's tensors, such as {missing[0]}")
    known_here = {manifest.stored_name(name) for name in here}  # under another name as well
    if left_over := sorted(name for name in there.keys() - here.keys() if manifest.stored_name(name) not in known_here):
        wrong.append(f"it holds {len(left_over)} that this model lacks, such as {left_over[0]}")
    if reshaped := [n for n in sorted(here.keys() & there.keys()) if here[n] != there[n]]:
        first = reshaped[0]
        wrong.append(f"{len(reshaped)} differ in shape, such as {first}: {there[first]} there, {here[first]} here")
    if wrong:
        raise Refused(
            f"The checkpoint {name} is of another model: {'; '.join(wrong)}. "
            "Give the model and method it was saved with, another run.name, or resume=none."
        )
