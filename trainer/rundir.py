"""The run directory: held by one run at a time, and brought back to the step that a run goes on from. Rank 0 only."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpointing import LeaseHeldError
from checkpointing.lease import Lease
from checkpointing.retention import clear_leftovers
from checkpointing.storage import FileStorage
from trainer.config import Config, as_yaml
from trainer.errors import Refused
from trainer.parallel.world import World
from trainer.resume import Start, turn_away_from
from trainer.track.files import roll_back

logger = logging.getLogger(__name__)


@contextmanager
def hold_run_directory(config: Config, world: World) -> Iterator[Lease | None]:
    """Rank 0 holds the directory, so that no second run writes into it. A dry run neither holds nor writes."""
    if world.rank != 0 or config.dry_run:
        yield None
        return
    make_directories(config)
    try:
        lease = Lease.acquire(FileStorage(Path(config.run.dir) / ".lease"))
    except LeaseHeldError as error:
        raise Refused(
            f"Another run uses {config.run.dir}: {error}. Wait until it has ended or stop it, or type another run.name."
        ) from None
    try:
        yield lease
    finally:
        lease.release()


def make_directories(config: Config) -> None:
    """Create what a run writes into, and see that it can be written."""
    for directory in (Path(config.run.dir), Path(config.checkpoint.dir)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".write-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            why = error.strerror or str(error)
            raise Refused(f"{directory} cannot be written: {why}. Type run.dir=DIRECTORY with one that can.") from None


def bring_back(config: Config, start: Start, step: int) -> list[str]:
    """Undo what lies after `step`, under the lease; returns what to tell the user."""
    told = []
    if step != start.step:
        told.append(f"the newest generation could not be read: going on from step {step}")
    if discarded := roll_back(Path(config.run.dir), step):
        told.append(f"{discarded} steps after step {step} are rolled back, to metrics.discarded.jsonl")
    turn_away_from(config, start, step)
    for name in clear_leftovers(FileStorage(config.checkpoint.dir)):
        logger.info("cleared %s, which a save left behind that never committed", name)
    (Path(config.run.dir) / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    return told
