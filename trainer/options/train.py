"""Options of the training: steps, batch, seed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from trainer.errors import Refused
from trainer.options.field import free, option

# OmegaConf reads these annotations at run time and knows Optional[int], not int | None.


@dataclass
class Train:
    steps: int = option(800, low=1)  # optimizer steps of the whole run
    epochs: Optional[float] = free(None)  # passes over the data; where given, steps follow from it
    global_batch: int = option(8, low=1)  # samples a step, on any number of processes
    micro_batch: int = option(2, low=1)  # samples computed at a time: the unit that never changes with the layout
    seq_len: int = option(128, low=1)  # target tokens a sample at most
    seed: int = option(0, low=0)  # weights, order of samples and dropout all follow from it
    profile: str = free("")  # FIRST:LAST steps that torch's profiler records, into run.dir/profile
    deterministic: bool = free(False)  # refuse kernels whose result varies from run to run (slower on GPUs)

    def refuse(self) -> None:
        """Refuse a number of epochs that is none, and steps that are no window."""
        if self.epochs is not None and not 0 < self.epochs < 1e9:
            raise Refused(f"train.epochs={self.epochs} must be above 0. Type train.epochs=3, or train.steps alone.")
        window_of(self.profile)


def window_of(text: str) -> tuple[int, int]:
    """`10:15` as the first step and the last; (0, 0) for nothing. `Refused` otherwise."""
    if not text:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise Refused(f"train.profile={text} is no FIRST:LAST of steps. Type one such as train.profile=10:15.")
    return first, last
