"""Weights & Biases, offline without an account. Whatever goes wrong with it, training goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.track.guarded import Guarded


@contextmanager
def unheard(*signals: signal.Signals) -> Iterator[None]:
    """Processes that are started meanwhile never hear these; this one hears them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WandbRun(Guarded):
    """One wandb run for all the incarnations of ours: the id is kept in the checkpoint."""

    def __init__(
        self, project: str, name: str, run_id: str, directory: Path, config: dict[str, Any], restarts: int = 0
    ) -> None:
        super().__init__("wandb")
        self._run: Any = None
        # Schedulers signal all processes of a job, and wandb's own would end before the last line has reached it.
        with unheard(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self.guard(lambda: self._start(project, name, run_id, directory, config))
        self.guard(lambda: self._run.summary.update({"restarts": restarts}))

    def step(self, row: dict[str, Any]) -> None:
        # The step is an ordinary value here: wandb drops rows whose own step goes back, as it does after a resume.
        numbers = {key: value for key, value in row.items() if key != "sample_ids" and value is not None}
        self.guard(lambda: self._run.log(numbers))

    def close(self, exit_code: int) -> None:
        self.guard(lambda: self._run.finish(exit_code=exit_code))
        self.alive = False

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
