"""Options of the learning rate's curve."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from trainer.options.field import option


class Curve(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class Schedule:
    curve: Curve = Curve.cosine
    warmup_steps: int = option(50, low=0)  # linear from zero
    final: float = option(0.1, low=0, high=1)  # of optimizer.lr, at the last step
