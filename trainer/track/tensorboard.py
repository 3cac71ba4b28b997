"""TensorBoard: a curve for every number of a step, in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.track.guarded import Guarded


class TensorBoard(Guarded):
    """One directory for all incarnations: TensorBoard drops what was logged of steps that are computed again."""

    def __init__(self, directory: Path, step: int) -> None:
        """`step` is the last that is done."""
        super().__init__("TensorBoard")
        self._writer: Any = None
        self.guard(lambda: self._start(directory, step))

    def _start(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def step(self, row: dict[str, Any]) -> None:
        def write() -> None:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, row["step"])

        self.guard(write)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.guard(lambda: self._writer.add_text("sample", f"{prompt}\n\n---\n\n{text}", step))

    def close(self, exit_code: int) -> None:
        self.guard(lambda: self._writer.close())
