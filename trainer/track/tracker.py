"""The one place that the loop reports to. Every rank has it; only rank 0's has sinks behind it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from checkpointing import CheckpointError, LeaseHeldError
from trainer.options.config import Config
from trainer.options.stored import as_json
from trainer.options.tracking import Tracker
from trainer.rundir import Leases
from trainer.track.console import Console
from trainer.track.files import Events, Metrics, Samples, spare_file
from trainer.track.tensorboard import TensorBoard
from trainer.track.wandb_run import WandbRun, where_it_goes

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the metrics of finished steps."""

    def step(self, row: dict[str, Any]) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def close(self, exit_code: int) -> None: ...


def where_figures_go(config: Config) -> str:
    """A line of the plan; empty where figures stay in the run's own files."""
    if config.tracking.tracker is Tracker.wandb:
        return where_it_goes(Path(config.run.dir))
    return f"tensorboard, in {config.run.dir}/tensorboard" if config.tracking.tracker is Tracker.tensorboard else ""


class RunTracker:
    """Metrics and events of a run, to its files, the terminal, and wandb or TensorBoard."""

    def __init__(
        self,
        config: Config,
        run_id: str,
        rank: int,
        incarnation: int = 1,
        step: int = 0,
        full_speed: float | None = None,
        *,
        altered: bool = False,
        leases: Leases | None = None,
    ) -> None:
        """`step` is the last that is done; MFU is the share of `full_speed`, in tokens a second of one device.

        `altered` says that steps after it may give other numbers than those that were told before. Nothing is written
        once another process has `leases`, and what is told while that cannot be known waits.
        """
        self._leases, self._fenced = leases, False
        self._waiting: list[Callable[[], None]] = []
        self._full_speed = full_speed
        self._sinks: list[Sink] = []
        self._metrics: Metrics | None = None
        self._events: Events | None = None
        if rank != 0:
            return
        run_dir = Path(config.run.dir)
        self._metrics = Metrics(run_dir / "metrics.jsonl", spare_file(config.checkpoint.dir))
        self._events = Events(run_dir / "events.jsonl")
        self._sinks = [
            self._metrics,
            Samples(run_dir / "samples.jsonl"),
            Console(config.train.steps, config.tracking.print_every),
        ]
        if config.tracking.tracker is Tracker.wandb:
            project, name = config.tracking.project, config.run.name
            self._sinks.append(
                WandbRun(project, name, run_id, run_dir, as_json(config), incarnation - 1, step if altered else None)
            )
        elif config.tracking.tracker is Tracker.tensorboard:
            self._sinks.append(TensorBoard(run_dir / "tensorboard", step))

    def step(self, row: dict[str, Any]) -> None:
        if self._full_speed is not None:
            row["mfu"] = row["tokens_per_s"] / (self._full_speed * row["world_size"])
        for sink in self._sinks:
            self._tell(partial(sink.step, row))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Text that the model wrote after a step."""
        for sink in self._sinks:
            self._tell(partial(sink.sample, step, prompt, text))

    def emit(self, event: str, **facts: Any) -> None:
        if self._events is not None:
            self._tell(partial(self._events.emit, event, **facts))

    def sync(self) -> None:
        """Make the metrics durable, before a checkpoint that a resume may start from. `OSError` where they are not."""
        if self._metrics is not None:
            if not self._tell():
                raise OSError("whether another process has taken the run over cannot be told, so its metrics wait")
            self._metrics.sync()

    def close(self, exit_code: int) -> None:
        """Close, but leave what another process has taken over; a terminal is given back in any case."""
        mine = False
        with contextlib.suppress(LeaseHeldError):
            mine = not self._fenced and self._tell()
        if self._waiting and not self._fenced:
            logger.warning("the last lines of this run could not be written: whether it is still its own is not known")
        for sink in self._sinks:
            if mine or isinstance(sink, Console):
                sink.close(exit_code)
        if mine and self._events is not None:
            self._events.close(exit_code)

    def _tell(self, *more: Callable[[], None]) -> bool:
        """Do this, after all that waits; whether it is done. `LeaseHeldError` once another process has the run."""
        self._waiting += more
        try:
            if self._leases is not None:
                self._leases.check()
        except LeaseHeldError:
            self._fenced = True
            raise
        except (CheckpointError, OSError):
            return False
        while self._waiting:
            self._waiting.pop(0)()
        return True
