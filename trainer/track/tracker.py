"""The one place that the loop reports to. Every rank has it; only rank 0's has sinks behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from trainer.config import Config, Tracker, as_json
from trainer.track.console import Console
from trainer.track.files import Events, Metrics, Samples
from trainer.track.tensorboard import TensorBoard
from trainer.track.wandb_run import WandbRun


class Sink(Protocol):
    """Takes the metrics of finished steps."""

    def step(self, row: dict[str, Any]) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def close(self, exit_code: int) -> None: ...


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
    ) -> None:
        """`step` is the last that is done; MFU is the share of `full_speed`, in tokens a second of one device.

        `altered` says that steps after it may give other numbers than those that were told before.
        """
        self._full_speed = full_speed
        self._sinks: list[Sink] = []
        self._metrics: Metrics | None = None
        self._events: Events | None = None
        if rank != 0:
            return
        run_dir = Path(config.run.dir)
        self._metrics, self._events = Metrics(run_dir / "metrics.jsonl"), Events(run_dir / "events.jsonl")
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
            sink.step(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Text that the model wrote after a step."""
        for sink in self._sinks:
            sink.sample(step, prompt, text)

    def emit(self, event: str, **facts: Any) -> None:
        if self._events is not None:
            self._events.emit(event, **facts)

    def sync(self) -> None:
        """Make the metrics durable, before a checkpoint that a resume may start from."""
        if self._metrics is not None:
            self._metrics.sync()

    def close(self, exit_code: int) -> None:
        for sink in self._sinks:
            sink.close(exit_code)
        if self._events is not None:
            self._events.close(exit_code)
