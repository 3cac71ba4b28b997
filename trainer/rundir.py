"""The run directory: held by one run at a time, and brought back to the step that a run goes on from. Rank 0 only."""

from __future__ import annotations

import contextlib
import errno
import logging
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from checkpointing import LeaseHeldError
from checkpointing.errors import first_few
from checkpointing.lease import Lease
from checkpointing.retention import clear_leftovers
from checkpointing.storage import FileStorage
from trainer.config import Config, as_yaml
from trainer.errors import Refused
from trainer.parallel.world import World
from trainer.resume import Start, own_tiers, turn_away_from
from trainer.track.files import roll_back

logger = logging.getLogger(__name__)


@contextmanager
def hold_run_directory(config: Config, world: World) -> Iterator[Lease | None]:
    """Rank 0 holds the run's directory and its checkpoints', so that no second run writes into either.

    The lease of the checkpoints is handed out. A dry run neither holds nor writes.
    """
    if world.rank != 0 or config.dry_run:
        yield None
        return
    made = make_directories(config)
    with ExitStack() as held:
        held.push(lambda kind, *_: remove_empty(made) if kind and issubclass(kind, Refused) else None)
        for key, directory in directories(config).items():  # two runs may share only the second
            lease = acquire(directory, key)
            held.callback(lease.release)
        yield lease


def directories(config: Config) -> dict[str, str]:
    """What a run writes into, by the option that names it. One directory may serve for both."""
    if Path(config.run.dir).resolve() == Path(config.checkpoint.dir).resolve():
        return {"run.dir": config.run.dir}
    return {"run.dir": config.run.dir, "checkpoint.dir": config.checkpoint.dir}


def acquire(directory: str, key: str) -> Lease:
    try:
        return Lease.acquire(FileStorage(Path(directory) / ".lease"))
    except LeaseHeldError as error:
        raise Refused(
            f"Another run uses {directory}: {error}. Wait until it has ended or stop it, or type another run.name."
        ) from None
    except OSError as error:
        raise cannot_write(directory, key, error) from None


def make_directories(config: Config) -> list[Path]:
    """Create what a run writes into, and see that it can be written; returns those that were not there."""
    made = []
    for key, name in directories(config).items():
        directory = Path(name)
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
        for empty in (directory / ".lease", directory):
            with contextlib.suppress(OSError):
                empty.rmdir()


def cannot_write(directory: object, key: str, error: OSError) -> Refused:
    why = error.strerror or str(error)
    remedy = "Make room" if error.errno == errno.ENOSPC else "Make it writable"
    return Refused(f"{directory} cannot be written: {why}. {remedy}, or type {key}=DIRECTORY with one that can.")


def bring_back(config: Config, start: Start, step: int) -> list[str]:
    """Undo what lies after `step`, under the leases; returns what to tell the user.

    In this order a crash between any two leaves a run that can be brought back again: first the room that dead saves
    take, then which generations count, then the metrics of what no longer counts.
    """
    told = []
    if step != start.step:
        told.append(f"the newest generation could not be read: going on from step {step}")
    try:
        for name in clear_leftovers(FileStorage(config.checkpoint.dir)):
            logger.info("cleared %s, which a save left behind that never committed", name)
        aside = turn_away_from(own_tiers(config), start, step)
        discarded, last = roll_back(Path(config.run.dir), step)
        (Path(config.run.dir) / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
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
