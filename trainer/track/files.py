"""metrics.jsonl, events.jsonl and samples.jsonl: one JSON object a line, the first without gaps or duplicates."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON objects, appended a line at a time. The torn last line of a killed process is removed first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            _drop_torn_end(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make everything written durable."""
        os.fsync(self._file.fileno())

    def close(self, exit_code: int) -> None:
        self._file.close()


class Metrics(JsonLines):
    """What each optimizer step measured."""

    def step(self, row: dict[str, Any]) -> None:
        self.write(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """In a file of its own."""


class Samples:
    """What the model wrote on the way, in a file that is there when it has written something."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, None if not path.exists() else JsonLines(path)

    def step(self, row: dict[str, Any]) -> None:
        """In a file of its own."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._lines = self._lines or JsonLines(self._path)
        self._lines.write({"step": step, "prompt": prompt, "text": text})

    def close(self, exit_code: int) -> None:
        if self._lines is not None:
            self._lines.close(exit_code)


class Events(JsonLines):
    """What happened to the run: start, resume, commit, resize, failure, finish."""

    def emit(self, event: str, **facts: Any) -> None:
        self.write({"event": event, **facts, "time": time.time(), "monotonic": time.monotonic()})


def read_lines(path: Path, tail: int = 0) -> list[dict[str, Any]]:
    """The objects of a file, or of its last `tail` bytes; what is no whole line is passed over."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - tail) if tail else 0)
            data = file.read()
    except OSError:
        return []
    found = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(one := json.loads(line), dict):
                found.append(one)
    return found


def roll_back(run_dir: Path, step: int) -> tuple[int, int]:
    """Move the metrics of steps after `step` to metrics.discarded.jsonl: how many there were, and the last step kept.

    In this order no line is lost: appended and synced there before it is cut off here.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0, 0
    _drop_torn_end(path)
    kept_bytes, last = 0, 0
    discarded: list[bytes] = []
    with open(path, "rb") as file:
        for line in file:
            number = _step_of(line)
            if not discarded and number is not None and number <= step:
                kept_bytes, last = kept_bytes + len(line), number
            else:
                discarded.append(line)
    if discarded:
        with open(run_dir / "metrics.discarded.jsonl", "ab") as file:
            file.writelines(discarded)
            file.flush()
            os.fsync(file.fileno())
        os.truncate(path, kept_bytes)
    return len(discarded), last


def _step_of(line: bytes) -> int | None:
    """None for a line that a crash of the machine has left unreadable."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _drop_torn_end(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
