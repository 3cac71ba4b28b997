"""A window of steps that torch's profiler records, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.options.train import window_of


class Window:
    """Records steps `first` to `last`, and writes a trace for Perfetto or chrome://tracing."""

    def __init__(self, text: str, directory: Path, rank: int) -> None:
        self._first, self._last = window_of(text)
        self._path = directory / f"rank-{rank:05d}.json.gz"
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if self._first <= number <= self._last and self._profile is None:  # also where a run resumes inside of it
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=kinds, record_shapes=True)
            self._profile.start()
        yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write what was recorded, also where the run ends before the window does."""
        if self._profile is not None:
            self._profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            self._profile = None
