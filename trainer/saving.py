"""The run's checkpoints: what goes in beside the tensors, when the metrics become durable, and what is kept."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpointing import CheckpointError, LeaseHeldError, LostError, save
from checkpointing.collective import Team
from checkpointing.lease import Lease
from checkpointing.memory import Durable, Outcome, Snapshotter
from checkpointing.retention import Keep, prune
from checkpointing.storage import FileStorage
from trainer.config import Config, as_json
from trainer.errors import TrainingFailed
from trainer.parallel.engine import TrainingEngine
from trainer.progress import Progress
from trainer.track.tracker import RunTracker

logger = logging.getLogger(__name__)

LAST_S = 600.0  # how long the last step may take from memory to the disk, before it is saved while the run waits


@dataclass
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
    snapshots: Snapshotter | None = None
    durable_step: int = -1  # the newest step that is known to be durable
    _owed: bool = False  # a step that was to become durable was not even snapshotted: the next one is instead
    _blocked_s: float = 0.0  # by saves since the last line
    _newest: float | None = None  # when the newest snapshot was taken

    def save(self, done: Progress, metrics: dict[str, float], *, durable: bool, last: bool) -> None:
        """Save what is done where that is due: durably, or in memory. Collective.

        With snapshots in memory a durable one is written in the background, and training goes on meanwhile.
        """
        durable = durable or self._owed
        if self.snapshots is None:
            if durable:
                self._save_now(done, metrics)
        elif durable or done.step % self.config.checkpoint.memory.every == 0:
            if durable:
                Team().together(self._make_sure)
            objects = {"trainer": self._state(done)}
            try:
                self.snapshots.snapshot(
                    done.step, self.engine.pieces(), objects, durable=durable, last=last, metrics=metrics
                )
            except LostError:
                raise
            except CheckpointError as error:  # on all ranks, such as where another layout does not fit any more
                self._report(Outcome(done.step, why=str(error)))
                if durable:
                    self._save_now(done, metrics)
                return
            self._owed = False

    def settle(self) -> dict[str, float]:
        """Report what became of the last snapshot and of those that were to become durable. Collective.

        Returns what the next line of metrics tells: the seconds that training waited, and where snapshots stand.
        """
        told: dict[str, float] = {}
        if self.snapshots is not None:
            if (outcome := self.snapshots.settle()) is not None:
                self._report(outcome)
                told["snapshot_bytes"], told["snapshot_backlog"] = outcome.memory, outcome.backlog
            if self._newest is not None:
                told["snapshot_age_s"] = time.monotonic() - self._newest
            for one in self.snapshots.durables():
                self._report_durable(one)
            self._blocked_s += self.snapshots.blocked_s
            self.snapshots.blocked_s = 0.0
        told["blocked_s"], self._blocked_s = self._blocked_s, 0.0
        return told

    def finish(self, done: Progress, metrics: dict[str, float]) -> None:
        """See that the last step is durable. Collective."""
        if self.snapshots is None or self.durable_step == done.step:
            return
        self.settle()
        self.snapshots.wait_durable(LAST_S)
        for one in self.snapshots.durables():
            self._report_durable(one)
        if not all(Team().together(lambda: self.durable_step == done.step)):
            self._save_now(done, metrics)

    def leave(self, done: Progress, metrics: dict[str, float]) -> None:
        """Make the last step durable at once, without waiting for what is on its way. Collective."""
        self.settle()
        if not all(Team().together(lambda: self.durable_step == done.step)):
            self._save_now(done, metrics)

    def _report(self, outcome: Outcome) -> None:
        if outcome.generation:
            self._newest = outcome.taken
            self.tracker.emit("snapshot", step=outcome.step, generation=outcome.generation)
        else:
            self.tracker.emit("snapshot", step=outcome.step, skipped=outcome.why)
            if outcome.durable:
                self._owed = True
                self._report_durable(Durable(outcome.step, why=f"its snapshot was left out: {outcome.why}"))

    def _report_durable(self, one: Durable) -> None:
        if one.generation:
            self.durable_step = one.step
            self._emit_commit(one.step, one.generation, one.seconds)
        elif self.lease is not None:
            logger.warning("step %d did not become durable: %s. Training goes on.", one.step, one.why)
            self.tracker.emit("commit", step=one.step, tier="durable", skipped=one.why)

    def _emit_commit(self, step: int, generation: str, seconds: float) -> None:
        self.tracker.emit("commit", step=step, tier="durable", generation=generation, seconds=seconds)
        if self.lease is not None:
            self._prune()

    def _save_now(self, done: Progress, metrics: dict[str, float]) -> None:
        """Save and commit while training waits."""
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
        self._blocked_s += seconds
        self.durable_step, self._owed = step, False
        self._emit_commit(step, generation, seconds)

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
