"""One command with its environment: as a person types it, and as we run it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# By its path rather than by its name: another package called `trainer` can then not be started in its place.
TRAINER = Path(__file__).resolve().parents[1] / "trainer" / "__main__.py"
ROOT = TRAINER.parents[1]


@dataclass(frozen=True)
class Command:
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The command as one types it into a shell."""
        return " ".join(
            [*(f"{key}={shlex.quote(value)}" for key, value in self.environment.items()), shlex.join(self.words)]
        )


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def threads(num_processes: int) -> dict[str, str]:
    """The cores of this machine shared out among its processes, so that they do not fight for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_processes)))}
