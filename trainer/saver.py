"""The run's checkpoints: what goes in beside the tensors, when the metrics become durable, and what is kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from checkpointing import (
    CheckpointError,
    Durable,
    Keep,
    LayoutError,
    LeaseHeldError,
    LostError,
    MismatchError,
    ReplicaError,
    SnapshotOutcome,
    Snapshotter,
    Team,
    prune,
    save,
)
from trainer.errors import TrainingFailed
from trainer.options.config import Config
from trainer.options.stored import as_json
from trainer.progress import Progress
from trainer.rundir import Leases
from trainer.track.tracker import RunTracker
from trainer.training import Training

logger = logging.getLogger(__name__)

FATAL = (LeaseHeldError, LostError, LayoutError, MismatchError, ReplicaError)  # the next save would fail as well
LAST_WAITS_S = (1.0, 5.0, 20.0)  # before the last step is tried again


@dataclass
class Saver:
    """Saves one run. `leases` are held by rank 0 and None elsewhere."""

    config: Config
    training: Training
    tracker: RunTracker
    run_id: str
    incarnation: int
    fingerprint: str  # of the training data
    architecture: str  # of the model
    leases: Leases | None
    snapshots: Snapshotter | None = None
    durable_step: int = -1  # the newest step that is known to be durable
    _owed: bool = False  # a step that was to become durable was not even snapshotted: the next one is instead
    _failed: int = 0  # steps in a row that did not become durable
    _blocked_s: float = 0.0  # by saves since the last line
    _newest: float | None = None  # when the newest snapshot was taken

    def save(self, done: Progress, metrics: dict[str, float], *, durable: bool, last: bool) -> None:
        """Save what is done where that is due: durably, or in memory. Collective.

        With snapshots in memory a durable one is written in the background, and training goes on meanwhile.
        """
        durable = durable or self._owed
        if self.snapshots is None:
            if durable:
                self._save_now(done, metrics, must=last)
        elif durable or done.step % self.config.checkpoint.memory.every == 0:
            if durable:
                durable = self._is_ready(done.step, must=last)
            objects = {"trainer": self._state(done)}
            try:
                self.snapshots.snapshot(
                    done.step,
                    self.training.pieces(),
                    objects,
                    durable=durable,
                    last=last,
                    metrics=metrics,
                    check_replicas=durable and self.config.checkpoint.check_replicas,
                )
            except LostError:
                raise
            except ReplicaError as error:
                raise self._failure(done.step, str(error), error) from error
            except CheckpointError as error:  # on all ranks, such as where another layout does not fit any more
                self._report(SnapshotOutcome(done.step, why=str(error)))
                if durable:
                    self._save_now(done, metrics, must=last)
                return
            self._owed = self._owed and not durable

    def fence(self) -> None:
        """Wait, before the state is written, for a snapshot that still copies it."""
        if self.snapshots is not None:
            self.snapshots.fence()

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
        self.snapshots.wait_durable(self.config.elastic.patience_s)
        for one in self.snapshots.durables():
            self._report_durable(one)
        if not all(Team().together(lambda: self.durable_step == done.step)):
            self._save_now(done, metrics, must=True)

    def leave(self, done: Progress, metrics: dict[str, float]) -> None:
        """Make the last step durable at once, without waiting for what is on its way. Collective."""
        self.settle()
        if not all(Team().together(lambda: self.durable_step == done.step)):
            self._save_now(done, metrics, must=True, waits=())

    def _report(self, outcome: SnapshotOutcome) -> None:
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
            self.durable_step, self._failed = one.step, 0
            self._emit_commit(one.step, one.generation, one.seconds)
        else:
            self._fail(one.step, one.why)

    def _fail(self, step: int, why: str, error: Exception | None = None) -> None:
        """A step did not become durable. Training goes on, unless too many in a row did not."""
        self._failed += 1
        limit = self.config.checkpoint.fail_after
        if limit and self._failed >= limit:
            raise self._failure(step, f"{why}. So it was {self._failed} times in a row (checkpoint.fail_after)", error)
        if self.leases is not None:
            logger.warning(
                "step %d did not become durable: %s. Training goes on, and the next save is tried.", step, why
            )
        self.tracker.emit("commit", step=step, tier="durable", skipped=why)

    def _emit_commit(self, step: int, generation: str, seconds: float) -> None:
        self.tracker.emit("commit", step=step, tier="durable", generation=generation, seconds=seconds)
        if self.leases is not None:
            self._prune()

    def _save_now(
        self, done: Progress, metrics: dict[str, float], *, must: bool, waits: Sequence[float] | None = None
    ) -> None:
        """Save and commit while training waits.

        One that fails is left out, and the next one is tried. One that `must` succeed is tried again after each of
        `waits`, and ends the run then.
        """
        again = LAST_WAITS_S if waits is None else waits
        for wait in (*again, None) if must else (None,):
            began = time.perf_counter()
            try:
                Team().together(self._make_sure, long=True)
                generation = self._save(done, metrics)
            except FATAL as error:
                if isinstance(error, LeaseHeldError):
                    raise  # the directory is another run's now: nothing more is written into it
                raise self._failure(done.step, str(error), error) from error
            except (CheckpointError, OSError) as error:  # of this rank, or of another one: all go the same way
                self._blocked_s += time.perf_counter() - began
                why = _why(error)
                if wait is not None:
                    if self.leases is not None:
                        logger.warning(
                            "step %d could not be saved: %s. It is tried again in %s s.", done.step, why, wait
                        )
                    time.sleep(wait)
                elif must:
                    raise self._failure(done.step, why, error) from error
                else:
                    self._fail(done.step, why, error)
            else:
                seconds = time.perf_counter() - began
                self._blocked_s += seconds
                self.durable_step, self._owed, self._failed = done.step, False, 0
                self._emit_commit(done.step, generation, seconds)
                return

    def _save(self, done: Progress, metrics: dict[str, float]) -> str:
        return save(
            self.config.checkpoint.dir,
            done.step,
            self.training.pieces(),
            {"trainer": self._state(done)},
            run_id=self.run_id,
            incarnation=self.incarnation,
            metrics=metrics,
            check_replicas=self.config.checkpoint.check_replicas,
            guard=partial(self.leases.check, anew=True) if self.leases is not None else None,
        )

    def _failure(self, step: int, why: str, error: Exception | None) -> TrainingFailed:
        failure = TrainingFailed(
            f"Step {step} could not be saved: {why}. What was saved before stays as it is, and the same command "
            f"goes on from there as soon as {self.config.checkpoint.dir} can be written."
        )
        failure.__cause__ = error or OSError(why)
        return failure

    def _is_ready(self, step: int, *, must: bool) -> bool:
        """Whether a step may become durable: not where the metrics up to it would not be there on a resume. Collective.

        The last step is snapshotted all the same, and saved when the run waits for it.
        """
        try:
            Team().together(self._make_sure, long=True)
        except FATAL:
            raise
        except (CheckpointError, OSError) as error:
            self._owed = True
            if not must:
                self._fail(step, _why(error), error)
            return False
        return True

    def _make_sure(self) -> None:
        """Make sure that the directory is still this run's, and that the metrics so far will be there on a resume."""
        if self.leases is not None:
            self.leases.check()
        self.tracker.sync()

    def _prune(self) -> None:
        """Delete old generations, on rank 0. Space that cannot be freed is worth a warning, not the run."""
        assert self.leases is not None
        try:
            self.leases.check()
            options = self.config.checkpoint
            prune(options.dir, Keep(options.keep, options.keep_every, options.keep_best))
        except LeaseHeldError:
            raise
        except (OSError, CheckpointError) as error:
            logger.warning("old generations in %s cannot be deleted: %s", self.config.checkpoint.dir, error)

    def _state(self, done: Progress) -> dict[str, Any]:
        return {
            **done.as_state(),
            "run_id": self.run_id,
            "world_size": self.training.world_size,
            "fingerprint": self.fingerprint,
            "architecture": self.architecture,
            "config": as_json(self.config),
        }


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
