"""Weights & Biases, offline without an account. Whatever goes wrong with it, training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class WandbRun:
    """One wandb run for all the incarnations of ours: the id is kept in the checkpoint."""

    def __init__(self, project: str, name: str, run_id: str, directory: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        self._guard(lambda: self._start(project, name, run_id, directory, config))

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
