"""How fast this machine is now, against the one that the seconds of tests are meant for.

Limits are written down in seconds of a core of a server of 2024. A slower one, or one that is lent to other virtual
machines too, is given as much more as it needs for a small piece of work of the kind that tests do. What other
processes of the same machine take is not seen.
"""

from __future__ import annotations

import statistics
import time

import torch

SPIN_S = 0.011  # what `spin` takes on the machine that is meant


def slowness() -> float:
    """How many times longer this machine takes now; 1 at least."""
    return max(1.0, statistics.median(spin() for _ in range(5)) / SPIN_S)


def spin() -> float:
    """Seconds of this thread for small objects, and calls into torch."""
    matrix, seen, began = torch.ones(16, 16), {}, time.thread_time()
    for number in range(20_000):
        seen[number % 97] = str(number)
        if number % 4 == 0:
            (matrix @ matrix).add_(matrix)
    return time.thread_time() - began
