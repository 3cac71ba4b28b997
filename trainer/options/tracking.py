"""Options of what is told of a run, and to whom."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from trainer.options.field import option


class Tracker(Enum):
    wandb = "wandb"
    tensorboard = "tensorboard"
    none = "none"


@dataclass
class Tracking:
    tracker: Tracker = Tracker.wandb
    project: str = "evershard"
    print_every: int = option(20, low=1)  # steps between lines, where the output is not a terminal
    peak_tflops: float = option(0, low=0)  # of one device, for mfu; 0: by its name, where that is known
