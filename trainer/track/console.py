"""Progress for a person: one live line on a terminal, one aligned line every n steps elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text


class Console:
    """Prints the metrics of steps; evaluated steps stay on a terminal as lines of their own."""

    def __init__(self, total_steps: int, print_every: int) -> None:
        self._total, self._every = total_steps, print_every
        self._live: Live | None = None
        self._last = ""  # the line that would go with the live display
        self._began: tuple[float, int] | None = None
        if sys.stdout.isatty():
            self._live = Live(console=RichConsole(), refresh_per_second=4, transient=True)
            self._live.start()

    def step(self, row: dict[str, Any]) -> None:
        line = self._line(row)
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
            self._last = "" if "eval_loss" in row else line
            if "eval_loss" in row:
                self._live.console.print(line, highlight=False, soft_wrap=True)
        elif row["step"] % self._every == 0 or row["step"] == self._total or "eval_loss" in row:
            print(line, flush=True)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The run prints the last one when it is finished; the others are in samples.jsonl."""

    def close(self, exit_code: int) -> None:
        if self._live is not None:
            self._live.stop()
            if self._last:
                self._live.console.print(self._last, highlight=False, soft_wrap=True)
            self._live = None

    def _line(self, row: dict[str, Any]) -> str:
        now, step = time.monotonic(), row["step"]
        began_at, began_step = self._began = self._began or (now, step)
        pace = (now - began_at) / (step - began_step) if step > began_step else row["step_s"]
        width = len(str(self._total))
        norm = f"{row['grad_norm']:7.3f}" if row["grad_norm"] is not None else "  (left out: overflow)"
        evaluated = f"  eval loss {row['eval_loss']:.4f}" if "eval_loss" in row else ""
        if "snapshot_age_s" in row:
            evaluated += f"  snapshot {row['snapshot_age_s']:.1f} s old"
        if "snapshot_bytes" in row:
            evaluated += f", {row['snapshot_bytes'] / 1e9:.2f} GB"
            evaluated += f", {row['snapshot_backlog']:.0f} to flush" if row["snapshot_backlog"] else ""
        return (
            f"step {step:>{width}}/{self._total}  loss {row['loss']:8.4f}  lr {row['lr']:.2e}  "
            f"grad {norm}  "
            f"{row['tokens_per_s']:8,.0f} tok/s  {_clock(pace * (self._total - step))} left{evaluated}"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
