"""The past of a run by its events.jsonl, in one pass: how often it started, under which ids, what it saved."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpointing.small_files import open_file
from trainer.errors import PASSING, Refused
from trainer.track.files import lines_of

MOST_STARTS = 2**32  # what is more was written by nobody who started that often


@dataclass
class History:
    """The past of a run; that of one without events is empty."""

    incarnation: int = 0  # the last, also of starts that saved nothing
    run_ids: set[str] = field(default_factory=set)
    in_memory: object = None  # the step of the last snapshot
    committed: bool = False  # whether anything was

    @staticmethod
    def of(run_dir: Path) -> History:
        """Lines that a crash cut short, or that are none, are passed over. `Refused` where the file is no record."""
        path, past = run_dir / "events.jsonl", History()
        try:
            with open_file(path) as file:
                for line in lines_of(file):
                    if b'"event"' in line:  # before it is parsed: somebody else's file may have any number of others
                        past._add(line)
        except FileNotFoundError:
            return past
        except OSError as error:
            if error.errno in PASSING:
                raise
            raise Refused(
                f"{path} is no record of a run: {error.strerror}. Move it away, or type another run.dir."
            ) from None
        return past

    def _add(self, line: bytes) -> None:
        try:
            event: Any = json.loads(line)
            kind = event["event"]
        except (ValueError, RecursionError, KeyError, TypeError):
            return
        if "run_id" in event:
            self.run_ids.add(str(event["run_id"]))
        if kind in ("start", "resume"):
            self.incarnation = max(self.incarnation, _start(event.get("incarnation")))
        elif kind == "snapshot" and event.get("generation"):
            self.in_memory = event.get("step")
        elif kind == "commit" and event.get("generation"):
            self.committed = True


def _start(number: Any) -> int:
    """The number of a start; 0 for what is none."""
    try:
        found = int(number)
    except (ValueError, TypeError, OverflowError):
        return 0
    return found if 0 <= found < MOST_STARTS else 0
