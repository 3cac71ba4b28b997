"""Weights & Biases, offline without an account. Whatever goes wrong with it, training goes on."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@contextmanager
def unheard(*signals: signal.Signals) -> Iterator[None]:
    """Processes that are started meanwhile never hear these; this one hears them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WandbRun:
    """One wandb run for all the incarnations of ours: the id is kept in the checkpoint."""

    def __init__(
        self, project: str, name: str, run_id: str, directory: Path, config: dict[str, Any], restarts: int = 0
    ) -> None:
        self._run: Any = None
        # Schedulers signal all processes of a job, and wandb's own would end before the last line has reached it.
        with unheard(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self._guard(lambda: self._start(project, name, run_id, directory, config))
        self._guard(lambda: self._run and self._run.summary.update({"restarts": restarts}))

    def step(self, row: dict[str, Any]) -> None:
        # The step is an ordinary value here: wandb drops rows whose own step goes back, as it does after a resume.
        numbers = {key: value for key, value in row.items() if key != "sample_ids" and value is not None}
        self._guard(lambda: self._run and self._run.log(numbers))

    def close(self, exit_code: int) -> None:
        self._guard(lambda: self._run and self._run.finish(exit_code=exit_code))
        self._run = None

    def _start(self, project: str, name: str, run_id: str, directory: Path, config: dict[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(directory),
            config=config,
            mode=mode,  # type: ignore[arg-type]  # a string from the environment
            settings=wandb.Settings(silent=True, init_timeout=30, console="off", x_disable_stats=False),
        )
        self._run.define_metric("*", step_metric="step")

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # by intention anything: tracking must never stop training
            logger.warning("wandb failed and is off for the rest of this run: %s: %s", type(error).__name__, error)
            self._run = None
