"""`python -m launch status RUN`: where a run or a sweep is. Reads files only."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from checkpointing import CheckpointError, FileStorage, holder_of, is_path, newest
from checkpointing.small_files import read_json, read_text
from trainer.errors import Refused
from trainer.track.files import read_lines

POINTS = "points.json"
TAIL = 65536  # bytes, in which the last line of metrics is


@dataclass(frozen=True)
class Status:
    """Where one run stands."""

    state: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float = 0.0
    age_s: float = 0.0  # of the last line of metrics
    snapshot: int | None = None  # the newest, in memory
    durable: int | None = None
    restarts: int = 0
    job: str = ""
    why: str = ""
    store: str = ""  # that its checkpoints are in, where that is no directory: as the run's events tell

    @staticmethod
    def of(run: Path) -> Status:
        """`Refused` where there is no run."""
        events = read_lines(run / "events.jsonl")
        job = _text(run / "launch" / "job")
        if not events:
            if job:
                attempts = read_lines(run / "launch" / "attempts.jsonl")
                if attempts and attempts[-1].get("again") is False:
                    return Status("failed", job=job, why=str(attempts[-1].get("ended", "")))
                return Status("waiting", job=job)
            raise Refused(f"{run} is no run: it has no events.jsonl. Type the directory of one, such as runs/main.")
        rows = read_lines(run / "metrics.jsonl", TAIL)
        row: dict[str, Any] = rows[-1] if rows else {}
        snapshots = [_whole(e, "step") for e in events if e.get("event") == "snapshot" and e.get("generation")]
        ends = [e for e in events if e.get("event") in ("start", "resume", "finish", "preempt", "failure")]
        alive = holder_of(FileStorage(run / ".lease")) is not None
        last = ends[-1]["event"] if ends else ""
        words = {"finish": "finished", "preempt": "preempted", "failure": "failed"}
        durable, store = _durable(run, events)
        evaluated = [loss for one in rows if (loss := _number(one, "eval_loss")) is not None]
        total = _option(run, "train.steps")
        return Status(
            "running" if alive else words.get(last, "dead"),
            _whole(row, "step"),
            total if isinstance(total, int) else 0,
            _number(row, "loss"),
            evaluated[-1] if evaluated else None,
            _number(row, "tokens_per_s") or 0.0,
            time.time() - (run / "metrics.jsonl").stat().st_mtime if rows else 0.0,
            snapshots[-1] if snapshots else None,
            durable,
            max(0, sum(e.get("event") in ("start", "resume") for e in events) - 1),
            job,
            str(ends[-1].get("reason") or ends[-1].get("abandoned") or "") if ends else "",
            store,
        )

    def __str__(self) -> str:
        def step(number: int | None) -> str:
            return "none" if number is None else f"step {number}"

        loss = "none yet" if self.loss is None else f"{self.loss:.4f}"
        loss += "" if self.eval_loss is None else f", held out {self.eval_loss:.4f}"
        lines = {
            "state": self.state + (f": {self.why}" if self.why else "") + (f" (job {self.job})" if self.job else ""),
            "step": f"{self.step} of {self.total}, {self.age_s:.0f} s ago",
            "loss": loss,
            "speed": f"{self.tokens_per_s:,.0f} tokens/s",
            "in memory": step(self.snapshot),
            "durable": step(self.durable) + (f" in {self.store}, by the run's word" if self.store else ""),
            "restarts": str(self.restarts),
        }
        if not self.total:
            lines = {"state": lines["state"]}
        return "\n".join(f"  {label:10} {text}" for label, text in lines.items())


def main(options: argparse.Namespace) -> int:
    run = Path(options.run)
    if (run / POINTS).is_file():
        print(summary(run))
    else:
        print(f"{run}\n{Status.of(run)}")
    return 0


def summary(home: Path) -> str:
    """A line for every point of a sweep, the best held-out loss first."""
    found = []
    try:
        points = read_json(home / POINTS)
    except (OSError, ValueError) as error:
        raise Refused(f"{home / POINTS} cannot be read: {error}. Type the directory of a sweep, or of a run.") from None
    for point in filter(_is_point, points if isinstance(points, list) else []):
        try:
            status = Status.of(home / point["dir"])
        except Refused:
            status = Status("not started")
        found.append((point, status))
    found.sort(key=lambda one: _loss(one[1]))
    differ = _differing([point["overrides"] for point, _ in found])
    rows = [("point", "state", "step", "loss", "held out", " ".join(differ))]
    for point, status in found:
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (status.loss, status.eval_loss)]
        own = [word.partition("=")[2] for word in point["overrides"] if word.partition("=")[0] in differ]
        rows.append((point["dir"], status.state, f"{status.step}/{status.total}", *losses, "  ".join(own)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _is_point(point: Any) -> bool:
    """Whether a point is one that a sweep writes: a directory right below its own, and words."""
    if not isinstance(point, dict) or not isinstance(name := point.get("dir"), str):
        return False
    words = point.get("overrides")
    plain = isinstance(words, list) and all(isinstance(word, str) for word in words)
    return plain and Path(name).name == name and name not in ("", ".", "..")


def _loss(status: Status) -> float:
    known = [loss for loss in (status.eval_loss, status.loss) if loss is not None]
    return known[0] if known else float("inf")


def _differing(points: list[list[str]]) -> list[str]:
    """The keys whose values are not the same everywhere, in the order of the command."""
    values: dict[str, set[str]] = {}
    for point in points:
        for word in point:
            key, _, value = word.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1]


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return read_text(path).strip()
    return ""


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None


def _whole(row: dict[str, Any], key: str) -> int:
    value = row.get(key)
    return value if isinstance(value, int) else 0


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without aliases, by which a small file becomes a large one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which no configuration of a run has")
        return super().compose_node(parent, index)


def _durable(run: Path, events: Sequence[dict[str, Any]]) -> tuple[int | None, str]:
    """The newest step that is durable, and the store that it is in.

    A store is not opened on the word of a run, which may be somebody else's.
    """
    place = str(_option(run, "checkpoint.dir") or "-")
    if not is_path(place):
        steps = [_whole(e, "step") for e in events if e.get("event") == "commit" and e.get("generation")]
        return max(steps, default=None), place
    with contextlib.suppress(CheckpointError, OSError):
        directory = Path(place) if Path(place).is_dir() else run / "checkpoints"  # as of a run that was moved
        found = newest(FileStorage(directory))
        return None if found is None else found.step, ""
    return None, ""


def _option(run: Path, key: str) -> Any:
    """One option of the run's configuration, as it stands there: nothing is resolved. None where it cannot be read."""
    found: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        found = yaml.load(read_text(run / "config.yaml"), _Plain)  # a safe loader
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
