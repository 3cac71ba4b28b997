"""The run's checkpoints: what goes in beside the tensors, when the metrics become durable, and what is kept."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing import CheckpointError, LeaseHeldError, save
from checkpointing.collective import Team
from checkpointing.lease import Lease
from checkpointing.retention import Keep, prune
from checkpointing.storage import FileStorage
from trainer.config import Config, as_json
from trainer.errors import TrainingFailed
from trainer.parallel.engine import TrainingEngine
from trainer.progress import Progress
from trainer.track.tracker import RunTracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saver:
    """Saves one run. `lease` is held by rank 0 and None elsewhere."""

    config: Config
    engine: TrainingEngine
    tracker: RunTracker
    run_id: str
    incarnation: int
    fingerprint: str  # of the training data
    architecture: str  # of the model
    lease: Lease | None

    def save(self, done: Progress, metrics: dict[str, float]) -> float:
        """Save and commit what is done; returns the seconds that training waited for it. Collective."""
        began, step = time.perf_counter(), done.step
        try:
            Team().together(self._make_sure)
            generation = save(
                Path(self.config.checkpoint.dir),
                step,
                self.engine.pieces(),
                {"trainer": self._state(done)},
                run_id=self.run_id,
                incarnation=self.incarnation,
                metrics=metrics,
                guard=self.lease.check if self.lease is not None else None,
            )
        except LeaseHeldError:
            raise  # the directory is another run's now: nothing more is written into it
        except (CheckpointError, OSError) as error:
            raise TrainingFailed(
                f"Step {step} could not be saved: {error}. What was saved before stays as it is, and the same command "
                f"goes on from there as soon as {self.config.checkpoint.dir} can be written."
            ) from error
        seconds = time.perf_counter() - began
        self.tracker.emit("commit", step=step, tier="durable", generation=generation, seconds=seconds)
        if self.lease is not None:
            self._prune()
        return seconds

    def _make_sure(self) -> None:
        """That the directory is still this run's, and that the metrics so far will be there on a resume."""
        if self.lease is not None:
            self.lease.check()
        self.tracker.sync()

    def _prune(self) -> None:
        """On rank 0. Space that cannot be freed is worth a warning, not the run."""
        try:
            options = self.config.checkpoint
            prune(FileStorage(options.dir), Keep(options.keep, options.keep_every, options.keep_best))
        except OSError as error:
            logger.warning("old generations in %s cannot be deleted: %s", self.config.checkpoint.dir, error)

    def _state(self, done: Progress) -> dict[str, Any]:
        return {
            **done.as_state(),
            "run_id": self.run_id,
            "world_size": self.engine.world_size,
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "config": as_json(self.config),
        }
