"""How a run ended, where its launcher asks: torchrun does not tell, and whether to try again depends on it."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpointing import CheckpointError, LeaseHeldError
from trainer.elastic.preemption import AGAIN
from trainer.errors import Refused, TrainingFailed

# A launcher names an empty directory in it; every rank leaves a file there.
DIRECTORY = "EVERSHARD_OUTCOME"


@dataclass(frozen=True)
class Outcome:
    """`status` is the process's; a run that would end like this again is `final`. `saved`: preempted after a save."""

    status: int
    final: bool
    why: str = ""
    rank: int = 0
    saved: bool = False

    @staticmethod
    def of(error: BaseException) -> Outcome:
        why = f"{error}" if isinstance(error, Refused | TrainingFailed) else f"{type(error).__name__}: {error}"
        if isinstance(error, Refused):
            return Outcome(2, final=not isinstance(error.__cause__ or error.__context__, LeaseHeldError), why=why)
        if isinstance(error, TrainingFailed):
            # A disk, another machine, or memory that ran out may have more next time.
            passing = isinstance(error.__cause__, CheckpointError | OSError | RuntimeError)
            return Outcome(1, final=not passing, why=why)
        return Outcome(130 if isinstance(error, KeyboardInterrupt) else 1, final=False, why=why)


def leave(outcome: Outcome) -> None:
    """Tell the launcher, if it asked. Never an error: the run has ended anyhow."""
    directory, rank = os.environ.get(DIRECTORY), int(os.environ.get("RANK", "0") or 0)
    if directory:
        with contextlib.suppress(OSError):
            path = Path(directory) / f"rank-{rank}.json"
            path.with_suffix(".new").write_text(json.dumps({**asdict(outcome), "rank": rank}), encoding="utf-8")
            path.with_suffix(".new").replace(path)


def has_failed() -> bool:
    """Whether a process of this run has said that it failed, where a launcher asked."""
    directory = os.environ.get(DIRECTORY)
    found = read(Path(directory)) if directory else None
    return found is not None and found.status not in (0, AGAIN)


def read(directory: Path) -> Outcome | None:
    """The outcome that explains those of all ranks; None where none could say, as after SIGKILL."""
    found = []
    for path in sorted(directory.glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Outcome(**json.loads(path.read_text(encoding="utf-8"))))

    # A refusal explains what others fail of, and a failure that would come again one that follows from it. All save
    # together; one that left without was told to because another had failed, or had too little time.
    def weight(one: Outcome) -> int:
        if one.status == AGAIN:
            return 1 if one.saved else 3
        return {2: 0, 0: 4}.get(one.status, 2)

    return min(found, key=lambda one: (not one.final, weight(one), one.rank), default=None)
