"""Options of the precision of matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Compute(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"  # with a dynamic loss scale


@dataclass
class Precision:
    compute: Compute = Compute.fp32  # of matrix products; parameters and optimizer stay fp32 masters
