"""The run directory: held by one run at a time, and brought back to the step that a run goes on from. Rank 0 only."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpointing import (
    EXPIRY_S,
    Holder,
    Lease,
    LeaseHeldError,
    UnreadableError,
    clear_leftovers,
    clear_released,
    is_path,
    open_storage,
)
from checkpointing.errors import first_few
from checkpointing.small_files import replace_file
from trainer.errors import FULL, PASSING, Refused, TrainingFailed
from trainer.inside import refuse_links
from trainer.options.config import Config
from trainer.options.stored import as_yaml
from trainer.parallel.world import World
from trainer.resume import Start, cannot_read, own_tiers, turn_away_from
from trainer.track.files import roll_back, spare_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leases:
    """The leases of the run directory and of the checkpoints', which may be one."""

    run: Lease
    checkpoints: Lease

    def check(self, *, anew: bool = False) -> None:
        """Raise `LeaseHeldError` once another process has one of them, as `Lease.check` does."""
        self.run.check(anew=anew)
        if self.checkpoints is not self.run:
            self.checkpoints.check(anew=anew)


@contextmanager
def hold_run_directory(config: Config, world: World) -> Iterator[Leases | None]:
    """Rank 0 holds the run's directory and its checkpoints', so that no second run writes into either.

    A dry run neither holds nor writes.
    """
    if world.rank != 0 or config.dry_run:
        yield None
        return
    made = make_directories(config)
    with ExitStack() as held:
        held.push(lambda kind, *_: remove_empty(made) if kind and issubclass(kind, Refused) else None)
        leases = acquire(directories(config))
        for lease in leases:
            held.callback(lease.release)
        yield Leases(leases[0], leases[-1])


def directories(config: Config) -> dict[str, str]:
    """The directories that a run writes into, by the option that names them. One may serve for both."""
    if is_path(config.checkpoint.dir) and Path(config.run.dir).resolve() == Path(config.checkpoint.dir).resolve():
        return {"run.dir": config.run.dir}
    return {"run.dir": config.run.dir, "checkpoint.dir": config.checkpoint.dir}


def acquire(directories: Mapping[str, str]) -> list[Lease]:
    """A lease of each, by the option that names it. All or none; holders elsewhere are watched at the same time."""
    with ThreadPoolExecutor(len(directories)) as pool:
        tries = {key: pool.submit(_acquire, directory, key) for key, directory in directories.items()}
    try:
        return [one.result() for one in tries.values()]
    except BaseException:
        for one in tries.values():
            if one.exception() is None:
                one.result().release()
        raise


def _acquire(directory: str, key: str) -> Lease:
    def waiting(holder: Holder | None) -> None:
        who = f"process {holder.pid} on {holder.host}" if holder else "a process that cannot be told"
        print(f"  {'waiting':10} up to {EXPIRY_S:.0f} s for a sign of {who}, which held {directory}", flush=True)

    try:
        return Lease.acquire(open_storage(f"{directory}/.lease"), waiting=waiting)
    except LeaseHeldError as error:
        raise Refused(
            f"Another run uses {directory}: {error}. Wait until it has ended or stop it, or type another run.name."
        ) from None
    except UnreadableError as error:
        raise cannot_read(error) from None
    except OSError as error:
        raise cannot_write(directory, key, error) from None


def make_directories(config: Config) -> list[Path]:
    """Create what a run writes into, and see that it can be written; returns those that were not there."""
    written = {key: name for key, name in directories(config).items() if is_path(name)}
    refuse_links(Path(config.run.dir), Path(written.get("checkpoint.dir", config.run.dir)))
    made = []
    for key, name in written.items():
        directory = Path(name)
        if link := next(
            (one for one in (directory, *directory.parents) if one.is_symlink() and not one.exists()), None
        ):
            raise Refused(
                f"{key}={name}: {link} is a link to {os.readlink(link)}, which is not there. Make that directory, or "
                "remove the link."
            )
        try:
            if not directory.exists():
                made.append(directory)
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".write-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise cannot_write(directory, key, error) from None
    return made


def remove_empty(made: list[Path]) -> None:
    """A refused command leaves no directories behind, as under a name with a typo."""
    for directory in reversed(made):
        clear_released(directory / ".lease")  # a claim of a run that has come since keeps the directory
        for empty in (directory / ".lease", directory):
            with contextlib.suppress(OSError):
                empty.rmdir()


def cannot_write(directory: object, key: str, error: OSError) -> Refused | TrainingFailed:
    """A refusal where somebody has to do something first: a failure, which a supervisor tries again, where not."""
    what = f"{directory} cannot be written: {error.strerror or error}."
    other = f"or type {key}=DIRECTORY with one that can."
    if error.errno in PASSING:
        return TrainingFailed(f"{what} Start the same command again when its storage works, {other}")
    return Refused(f"{what} {'Make room' if error.errno in FULL else 'Make it writable'}, {other}")


def bring_back(config: Config, start: Start, step: int) -> list[str]:
    """Undo what lies after `step`, under the leases; returns what to tell the user.

    In this order a crash between any two leaves a run that can be brought back again: first the room that dead saves
    take, then which generations count, then the metrics of what no longer counts.
    """
    told = []
    if step != start.step:
        told.append(f"the newest generation could not be read: going on from step {step}")
    try:
        for name in clear_leftovers(open_storage(config.checkpoint.dir)):
            logger.info("cleared %s, which a save left behind that never committed", name)
        aside = turn_away_from(own_tiers(config), start, step)
        run_dir = Path(config.run.dir)
        discarded, last = roll_back(run_dir, step, spare_file(config.checkpoint.dir))
        replace_file(run_dir / "config.yaml", as_yaml(config).encode())
    except UnreadableError as error:
        raise cannot_read(error) from error
    except OSError as error:
        raise cannot_write(config.run.dir, "run.dir", error) from error
    if aside:
        told.append(
            f"{len(aside)} generations are set aside, and deleted when checkpoint.keep={config.checkpoint.keep} others "
            "are there: " + first_few(aside)
        )
    if discarded:
        told.append(f"{discarded} steps after step {step} are rolled back, to metrics.discarded.jsonl")
    if last < step and start.own:
        told.append(f"metrics.jsonl ends at step {last}: the lines up to step {step} are lost, the training is not")
    return told
