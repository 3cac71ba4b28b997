"""What a crash campaign records besides `save`: flush, prune, abandon, export, and the small files of a run.

    python -m benchmarks.crash_actions TOP RANK SIZE PORT ACTION...    (the process that is recorded)

Each has a directory, prepared before; what it may leave is judged by what a start or a reader would do with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.crash_ranks import NEW, OLD, WITHOUT_SYNC, Recording, record, save_step, without_sync
from checkpointing import lease as leases
from checkpointing.collective import Team
from checkpointing.export import export_hugging_face, export_torch
from checkpointing.generations import abandon, candidates, newest, scan
from checkpointing.lease import Lease
from checkpointing.memory.flush import DirectStorage, flush
from checkpointing.memory.mapped import MappedStorage
from checkpointing.reader import GenerationReader
from checkpointing.retention import Keep, clear_leftovers, prune
from checkpointing.storage import FileStorage
from trainer.compose import compose
from trainer.identity import Identity, identify, recorded
from trainer.options.config import Config
from trainer.resume import become_itself, make_memory_directory, memory_directory
from trainer.track.files import Metrics, read_lines, roll_back

STEPS = (1, 2, 3)


@dataclass(frozen=True)
class Action:
    """Something that is done to a directory. `judge` says `old` or `new`, or else what is wrong with what is left."""

    prepare: Callable[[Path], None]
    act: Callable[[Path], object]
    judge: Callable[[Path], str]


def _prepare_generations(directory: Path) -> None:
    _generations(directory, STEPS)


def _generations(directory: Path, steps: Sequence[int]) -> None:
    for step in steps:
        save_step(step, directory, Team())


def _beside(directory: Path, name: str) -> Path:
    """What an action reads, which is not crashed."""
    return directory.parent / f"{directory.name}-{name}"


def _sound(storage: FileStorage) -> list[int]:
    """The steps of what may be gone on from, newest first; raises where one of them is damaged."""
    for generation in (found := candidates(storage)):
        assert generation.manifest is not None, f"{generation.name} is committed without a manifest"
        for tensor, _, damage in GenerationReader(storage, generation.manifest).verify():
            assert damage is None, f"{tensor} of {generation.name}: {damage}"
    return [generation.step for generation in found]


# Flush, prune, abandon.


def _prepare_flush(directory: Path) -> None:
    _generations(directory, [OLD])
    _generations(_beside(directory, "memory"), [NEW])


def _flush(directory: Path) -> None:
    memory = MappedStorage(_beside(directory, "memory"))
    generation = newest(memory)
    assert generation is not None
    flush(memory, DirectStorage(directory), generation.name)


def _judge_flush(directory: Path) -> str:
    steps = _sound(FileStorage(directory))
    return {(OLD,): "old", (NEW, OLD): "new"}.get(tuple(steps), f"steps {steps} are there")


def _judge_prune(directory: Path) -> str:
    storage = FileStorage(directory)
    steps = _sound(storage)
    if steps[:1] != [STEPS[-1]]:
        return f"steps {steps} are there, and the newest is not"
    clear_leftovers(storage)
    if left := [one.name for one in scan(storage) if not one.sound]:
        return f"{left[0]} cannot be cleared away"
    return "new" if len(steps) == 1 else "old"


def _abandon(directory: Path) -> None:
    storage = FileStorage(directory)
    abandon(storage, [one for one in candidates(storage) if one.step > STEPS[0]])


def _judge_abandon(directory: Path) -> str:
    steps = _sound(FileStorage(directory))
    return {STEPS[-1]: "old", STEPS[0]: "new"}.get(steps[0], f"step {steps[0]}, of the branch that was left, is chosen")


# The metrics of a run.


def _lines(steps: Sequence[int]) -> str:
    return "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps)


def _prepare_lines(directory: Path, here: Sequence[int], late: Sequence[int] = ()) -> None:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(_lines(here))
    if late:
        (directory / "late.jsonl").write_text(_lines(late))


def _write_metrics(directory: Path) -> None:
    metrics = Metrics(directory / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.step({"step": step, "loss": 1 / step})
    metrics.sync()


def _judge_metrics(directory: Path) -> str:
    roll_back(directory, 3)  # as a start does
    steps = [row["step"] for row in read_lines(directory / "metrics.jsonl")]
    if steps != list(range(1, len(steps) + 1)):
        return f"the lines of steps {steps} are there"
    return "new" if len(steps) == 3 else "old"


def _roll_back(directory: Path) -> None:
    roll_back(directory, 5, directory / "late.jsonl")


def _judge_roll_back(directory: Path) -> str:
    """All nine lines are somewhere, whatever happened; rolled back once more, five are kept and four set aside."""

    def kept() -> list[int]:
        return [row["step"] for row in read_lines(directory / "metrics.jsonl")]

    outcome = "new" if kept() == [1, 2, 3, 4, 5] else "old"
    roll_back(directory, 5, directory / "late.jsonl")
    aside = {row["step"] for row in read_lines(directory / "metrics.discarded.jsonl")}
    if kept() != [1, 2, 3, 4, 5] or aside != {6, 7, 8, 9}:
        return f"steps {kept()} are kept, and {sorted(aside)} set aside"
    return outcome


# Who a run is, and who writes into it.


def _config(directory: Path) -> Config:
    return compose([f"run.dir={directory}", f"checkpoint.memory.dir={directory / 'memory'}"])


def _prepare_copy(directory: Path) -> None:
    """The directory of a copy: its run lives elsewhere, with memory."""
    directory.mkdir()
    (directory / ".identity.json").write_text(json.dumps(asdict(Identity("/elsewhere", 1, "before"))))
    (directory / "memory-id").write_text("before-0123456789ab\n")


def _judge_identity(directory: Path) -> str:
    found = recorded(directory)
    if found is None:
        return "nobody knows whose the directory is"
    return {"before": "old", "now": "new"}.get(found.run_id, f"it is {found}'s")


def _judge_memory(directory: Path) -> str:
    found = memory_directory(_config(directory))
    if found is None and (directory / "memory-id").exists():
        return "the name of its memory is torn"
    return "old" if found is None else "new"


def _judge_copied(directory: Path) -> str:
    """Whatever is left of it, the other run's memory is not taken for its own."""
    found = recorded(directory)
    if found is None or (found.run_id != "before" and (directory / "memory-id").exists()):
        return f"it is {found}'s, with the memory of the run that it is a copy of"
    return "old" if found.run_id == "before" else "new"


def _lease(directory: Path) -> None:
    Lease.acquire(FileStorage(directory))


def _judge_lease(directory: Path) -> str:
    """A claim is whole or not there, so that its holder is known at once to be dead; whoever comes then has it."""
    storage = FileStorage(directory)
    numbers = leases._numbers(storage)
    content = leases._read(storage, f"lease-{numbers[-1]:06d}.json") if numbers else None
    if numbers and leases._parse_holder(content) is None:
        return f"a claim says {content!r}"
    Lease.acquire(storage, expiry_s=0).release()
    return "new" if numbers else "old"


# What is exported.


def _prepare_export(directory: Path) -> None:
    directory.mkdir()
    _generations(_beside(directory, "run"), [NEW])
    description = _beside(directory, "model")
    description.mkdir()
    (description / "config.json").write_text('{"model_type": "of nobody"}')
    (description / "tokenizer.json").write_text("{}" * 500)
    for kind in (_export_directory, _export_file):
        kind(_beside(directory, "expected"))


def _reader(directory: Path) -> GenerationReader:
    storage = FileStorage(directory.parent / f"{directory.name.removesuffix('-expected')}-run")
    generation = newest(storage)
    assert generation is not None and generation.manifest is not None
    return GenerationReader(storage, generation.manifest)


def _export_directory(directory: Path) -> None:
    description = directory.parent / f"{directory.name.removesuffix('-expected')}-model"
    export_hugging_face(_reader(directory), directory / "hf", description)


def _export_file(directory: Path) -> None:
    export_torch(_reader(directory), directory / "model.pt")


def _judge_export(directory: Path, recorded_in: Path) -> str:
    expected, outcome = _beside(recorded_in, "expected"), "old"
    for path in (expected / "hf", expected / "model.pt"):
        here = directory / path.name
        if not here.exists():
            continue
        outcome = "new"
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            copy = here if path.is_file() else here / file.name
            if not copy.exists() or copy.read_bytes() != file.read_bytes():
                return f"{path.name} is there, and {file.name} in it is not whole"
    return outcome


def action(top: Path, case: str) -> Action:
    """What `case`, a directory below `top`, is about: `WITHOUT_SYNC` may follow its name."""
    directory = top / case
    return {
        "flush": Action(_prepare_flush, _flush, _judge_flush),
        "prune": Action(_prepare_generations, lambda place: prune(FileStorage(place), Keep(1)), _judge_prune),
        "abandon": Action(_prepare_generations, _abandon, _judge_abandon),
        "metrics": Action(Path.mkdir, _write_metrics, _judge_metrics),
        "roll-back": Action(lambda place: _prepare_lines(place, range(1, 10)), _roll_back, _judge_roll_back),
        "late-lines": Action(
            lambda place: _prepare_lines(place, range(1, 4), range(4, 10)), _roll_back, _judge_roll_back
        ),
        "identity": Action(_prepare_copy, lambda place: identify(place, "now"), _judge_identity),
        "memory-id": Action(Path.mkdir, lambda place: make_memory_directory(_config(place)), _judge_memory),
        "copied": Action(_prepare_copy, lambda place: become_itself(_config(place), False, None), _judge_copied),
        "lease": Action(Path.mkdir, _lease, _judge_lease),
        "export-directory": Action(_prepare_export, _export_directory, lambda place: _judge_export(place, directory)),
        "export-file": Action(_prepare_export, _export_file, lambda place: _judge_export(place, directory)),
    }[case.removesuffix(f".{WITHOUT_SYNC}")]


ACTIONS = (
    *("flush", "prune", "abandon", "metrics", "roll-back", "late-lines", "identity", "memory-id", "copied", "lease"),
    *("export-directory", "export-file"),
)


def record_actions(top: Path, cases: Sequence[str]) -> dict[str, Recording]:
    """Record these under strace, all in one process."""
    top = top.resolve()
    logging.disable()
    try:
        prepare = lambda place: action(top, place.name).prepare(place)  # noqa: E731
        return record(top, 1, cases, prepare, module="benchmarks.crash_actions")
    finally:
        logging.disable(logging.NOTSET)


class Judge:
    """What an action may leave, each distinct state once; `campaign` asks it."""

    def __init__(self, action: Action) -> None:
        self._action = action
        self._known: dict[tuple[tuple[str, bytes], ...], str] = {}

    @property
    def outcomes(self) -> dict[str, int]:
        found = list(self._known.values())
        return {outcome: found.count(outcome) for outcome in found}

    def outcome(self, listing: Mapping[str, bytes]) -> str:
        key = tuple(sorted(listing.items()))
        if key not in self._known:
            with _laid_out(listing) as directory:
                try:
                    self._known[key] = self._action.judge(directory)
                except Exception as error:  # whatever a user would see
                    self._known[key] = f"{type(error).__name__}: {error}"
        return self._known[key]


@contextlib.contextmanager
def _laid_out(listing: Mapping[str, bytes]) -> Iterator[Path]:
    memory = Path("/dev/shm")
    top = Path(tempfile.mkdtemp(prefix="crash-", dir=memory if memory.is_dir() else None))
    try:
        for name, data in listing.items():
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(data)
        yield top
    finally:
        shutil.rmtree(top)


def main(top: str, _rank: str, _size: str, _port: str, *cases: str) -> None:
    logging.disable()  # a warning would be written to a file that nobody has seen opened
    for case in cases:
        with without_sync() if case.endswith(f".{WITHOUT_SYNC}") else contextlib.nullcontext():
            action(Path(top), case).act(Path(top, case))
        Path(top, "returned", case, "0").touch()
    os._exit(0)  # a lease is not given back


if __name__ == "__main__":
    main(*sys.argv[1:])
