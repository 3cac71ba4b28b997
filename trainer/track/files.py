"""metrics.jsonl, events.jsonl and samples.jsonl: one JSON object a line, the first without gaps or duplicates.

A disk that is full, or fails, does not end training: lines that it does not take are kept, and written when it does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

from checkpointing import FileStorage, open_storage
from checkpointing.small_files import open_file, replace_file, sync_directory

logger = logging.getLogger(__name__)

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, and no pipe
LINES_HELD = 1000  # lines that are not durable yet, before the disk is asked to make them so


class JsonLines:
    """A file of JSON objects, appended a line at a time. The torn last line of a killed process is removed first.

    No write raises. Lines are held until a sync has succeeded: one that fails may have lost any line before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._durable = 0  # bytes of the file that the last sync covered
        self._lines: list[bytes] = []  # after those
        self._rest = bytearray()  # the end of `lines`, which is not in the file yet
        self._suspect = False  # whether the file may lack what was written since the last sync
        self._failing = False
        self._has_name = False  # durably
        self._try_to(self._open)

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps({key: _as_json(value) for key, value in row.items()}, allow_nan=False).encode() + b"\n"
        self._lines.append(line)
        self._rest += line
        self._try_to(self._append if len(self._lines) % LINES_HELD else self.sync)

    def sync(self) -> None:
        """Make everything written durable. `OSError` where the disk does not: then it is all kept."""
        self._append()
        try:
            os.fsync(self._open())
            if not self._has_name:
                sync_directory(self.path.parent)  # a file that is new is lost with its name
                self._has_name = True
        except OSError:
            self._suspect = True
            raise
        self._durable += sum(map(len, self._lines))
        self._lines.clear()

    def close(self, exit_code: int) -> None:
        self._try_to(self._append)
        if self._rest:
            logger.warning("the last lines of %s could not be written, and are lost", self.path)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            if self.path.exists():
                _drop_torn_end(self.path)
            self._descriptor = os.open(self.path, APPEND, 0o666)
            self._durable = os.fstat(self._descriptor).st_size
        return self._descriptor

    def _append(self) -> None:
        descriptor = self._open()
        if self._suspect:
            os.ftruncate(descriptor, self._durable)
            self._rest[:] = b"".join(self._lines)
            self._suspect = False
        while self._rest:
            del self._rest[: os.write(descriptor, self._rest)]

    def _try_to(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s cannot be written: %s. Training goes on; its lines are kept, and written when it can be.",
                    self.path,
                    error.strerror or error,
                )
            self._failing = True
        else:
            self._failing = False


def _as_json(value: Any) -> Any:
    """A value for JSON: what is no number by its name, `nan`, `inf` or `-inf`, as JSON has none for it."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


class Metrics(JsonLines):
    """Measurements of each optimizer step.

    Lines that must be durable, and that the file's disk does not take, go to `spare`, a file on another disk. They come
    back from there when the run is started again.
    """

    def __init__(self, path: Path, spare: Path | None = None) -> None:
        self._spare = spare
        super().__init__(path)

    def step(self, row: dict[str, Any]) -> None:
        self.write(row)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write to a file of its own."""

    def sync(self) -> None:
        try:
            super().sync()
        except OSError:
            if self._spare is None:
                raise
            replace_file(self._spare, b"".join(self._lines))
        else:
            if self._spare is not None:
                with contextlib.suppress(OSError):
                    self._spare.unlink(missing_ok=True)

    def close(self, exit_code: int) -> None:
        self._try_to(self._append)
        if self._rest and self._spare is not None:
            with contextlib.suppress(OSError):
                self.sync()
                self._rest.clear()
        super().close(exit_code)


class Samples:
    """Texts that the model wrote on the way, in a file that is there when it has written one."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, None if not path.exists() else JsonLines(path)

    def step(self, row: dict[str, Any]) -> None:
        """Write to a file of its own."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._lines = self._lines or JsonLines(self._path)
        self._lines.write({"step": step, "prompt": prompt, "text": text})

    def close(self, exit_code: int) -> None:
        if self._lines is not None:
            self._lines.close(exit_code)


class Events(JsonLines):
    """Events of the run: start, resume, commit, resize, failure, finish."""

    def emit(self, event: str, **facts: Any) -> None:
        self.write({"event": event, **facts, "time": time.time(), "monotonic": time.monotonic()})


def read_lines(path: Path, tail: int = 0) -> list[dict[str, Any]]:
    """The objects of a file, or of its last `tail` bytes; what is no whole line is passed over.

    Of a file that cannot be read, or is none, there are none.
    """
    found = []
    try:
        with open_file(path) as file:
            file.seek(max(0, path.stat().st_size - tail) if tail else 0)
            for line in lines_of(file):
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(one := json.loads(line), dict):
                        found.append(one)
    except OSError:
        return found
    return found


LONGEST = 16 * 2**20  # bytes of a line: what is longer was not written by a run
MOST = 8 * 2**30  # of a file


def lines_of(file: BinaryIO, most: int = MOST) -> Iterator[bytes]:
    """Line by line; `OSError` where one has no end in sight, or where they go on for more than `most` bytes."""
    read = 0
    while line := file.readline(LONGEST):
        read += len(line)
        if (len(line) == LONGEST and not line.endswith(b"\n")) or read > most:
            raise OSError(errno.EFBIG, "it has more than a run writes", file.name)
        yield line


SPARE = "metrics.late.jsonl"  # beside the checkpoints
MOST_SPARE = 2**28  # bytes of it: lines that a run held in its memory


def spare_file(checkpoints: str) -> Path | None:
    """Where lines go that metrics.jsonl does not take; None where checkpoints lie in a store that is no directory."""
    storage = open_storage(checkpoints)
    return storage.root / SPARE if isinstance(storage, FileStorage) else None


def roll_back(run_dir: Path, step: int, spare: Path | None = None) -> tuple[int, int]:
    """Move the metrics of steps after `step` to metrics.discarded.jsonl: how many there were, and the last step kept.

    Lines that went to `spare`, because metrics.jsonl could not be written, are taken into account, and come back. In
    this order no line is lost: appended and synced there before it is cut off here.
    """
    path = run_dir / "metrics.jsonl"
    late = dict[int, bytes]()
    if spare is not None and spare.exists():
        with open_file(spare) as file:
            for line in lines_of(file, MOST_SPARE):
                if (number := _step_of(line)) is not None:
                    late.setdefault(number, line)
    if path.exists():
        _drop_torn_end(path)
    elif late:
        path.touch()
    else:
        return 0, 0
    kept_bytes, last, cut = 0, 0, 0  # of those that are cut off, the file may have any number
    with open_file(path) as file:
        for line in lines_of(file):
            number = _step_of(line)
            if not cut and number is not None and number <= step:
                kept_bytes, last = kept_bytes + len(line), number
            else:
                cut += 1
                if number is not None and number > step:
                    late.pop(number, None)
    home = [number for number in sorted(late) if last < number <= step]
    lost = [number for number in sorted(late) if number > step]
    discarded = run_dir / "metrics.discarded.jsonl"
    if cut:
        with open_file(path) as file:
            file.seek(kept_bytes)
            _add(discarded, iter(partial(file.read, 2**18), b""))
    if lost:
        _add(discarded, map(late.__getitem__, lost))
    if cut:
        os.truncate(path, kept_bytes)
    if cut or home:
        _add(path, map(late.__getitem__, home))
    if spare is not None and spare.exists():
        spare.unlink()
        sync_directory(spare.parent)
    return cut + len(lost), max([last, *home])


def _add(path: Path, parts: Iterable[bytes]) -> None:
    """Append lines to a file, which is durable with its name and its size when this returns."""
    if path.exists():
        _drop_torn_end(path)
    with os.fdopen(os.open(path, APPEND, 0o666), "ab") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def _step_of(line: bytes) -> int | None:
    """None for a line that a crash of the machine has left unreadable."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def _drop_torn_end(path: Path) -> None:
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LONGEST))
        end = file.read()
    whole = end.rfind(b"\n") + 1
    if whole == 0 and size > LONGEST:
        raise OSError(errno.EFBIG, "it has more than a run writes", str(path))
    if whole < len(end):
        os.truncate(path, size - len(end) + whole)
