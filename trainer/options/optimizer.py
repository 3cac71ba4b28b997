"""Options of the optimizer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from math import isfinite

from trainer.errors import Refused
from trainer.options.field import option


class Implementation(Enum):
    fused = "fused"  # torch's
    foreach = "foreach"  # torch's: many tensors at a time, with temporaries of their size
    torchao_8bit = "torchao_8bit"  # moments of 8 bits (Dettmers et al. 2022, arXiv:2110.02861)


@dataclass
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    implementation: Implementation = Implementation.fused
    lr: float = option("${method.lr}", low=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = option(1e-8, low=0)
    weight_decay: float = option("${method.weight_decay}", low=0)  # on matrices only, not on norms and biases
    lr_scale: list[str] = field(default_factory=list)  # pattern:factor, of lr for names that match; the first counts
    clip: float = option(1.0, low=0)  # largest norm of the whole gradient; 0: no clipping

    @property
    def made_by(self) -> str:
        """MODULE:CLASS of the kind of optimizer."""
        low = self.implementation is Implementation.torchao_8bit
        return "trainer.optimizers.adamw_8bit:EightBitKind" if low else "trainer.optimizers.adamw:AdamWKind"

    def refuse(self) -> None:
        """Refuse betas and rates that are none, and a library that is not there."""
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise Refused(
                f"optimizer.betas={self.betas} must be two numbers in [0, 1), such as optimizer.betas=[0.9,0.95]."
            )
        rates_by_pattern(self.lr_scale)
        if self.implementation is Implementation.torchao_8bit and find_spec("torchao") is None:
            raise Refused(
                "8-bit moments are torchao's, which is not installed. Type `pip install torchao`, or "
                "optimizer.implementation=fused."
            )


def rates_by_pattern(lr_scale: list[str]) -> dict[str, float]:
    """Factors by pattern of optimizer.lr_scale, in its order. `Refused` for what is no pattern:factor."""
    rates = {}
    for given in lr_scale:
        pattern, _, factor = given.rpartition(":")
        try:
            re.compile(pattern)
            rates[pattern] = float(factor)
            flaw = "" if pattern and isfinite(rates[pattern]) and rates[pattern] >= 0 else "it has no factor from 0 on"
        except (re.error, ValueError) as error:
            flaw = str(error)
        if flaw:
            raise Refused(
                f"optimizer.lr_scale={given} is no pattern:factor ({flaw}). Type one such as "
                "'optimizer.lr_scale=[\"lm_head:0.1\"]'."
            )
    return rates
