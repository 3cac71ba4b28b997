"""Processes on this machine, by torchrun: the command, its environment, and the trainer's exit status."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# By its path rather than by its name: another package called `trainer` can then not be started in its place.
TRAINER = Path(__file__).resolve().parents[1] / "trainer" / "__main__.py"


def torchrun_arguments(num_processes: int, overrides: Sequence[str]) -> list[str]:
    """The arguments of torchrun for one machine."""
    return ["--standalone", f"--nproc-per-node={num_processes}", str(TRAINER), *overrides]


def environment(num_processes: int) -> dict[str, str]:
    """What the processes need in their environment: the cores shared out, so that they do not fight for them."""
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes) if hasattr(os, "sched_getaffinity") else 1
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def command_line(num_processes: int, overrides: Sequence[str]) -> str:
    """The same as a command to type."""
    variables = [f"{key}={value}" for key, value in environment(num_processes).items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(num_processes, overrides)]
    return " ".join([*variables, shlex.join(torchrun)])


def run_local(num_processes: int, overrides: Sequence[str]) -> int:
    """Run the trainer on `num_processes` processes; returns its exit status, or 128 + n where signal n ended it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.update(environment(num_processes))
    # Its reports of failed children repeat what the children said, at length; the status below is the short form.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(torchrun_arguments(num_processes, overrides)))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, exitcode = find_cause({rank: failure.exitcode for rank, failure in error.failures.items()})
        status = exitcode if exitcode > 0 else 128 - exitcode
        if exitcode < 0:
            print(
                f"launch: rank {rank} was ended by signal {-exitcode}; "
                "with resume=auto, the default, the same command goes on from the last checkpoint",
                file=sys.stderr,
            )
        elif status != 2:  # a refusal has explained itself
            print(f"launch: rank {rank} failed with status {status}; its message is above", file=sys.stderr)
        return status
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def find_cause(exitcodes: Mapping[int, int]) -> tuple[int, int]:
    """The rank whose end explains the others', and its exit code (negative: the signal that ended it).

    A rank that loses another in the middle of a step fails of it, often before the launcher sees who was first. So a
    signal from outside explains most, then a refusal, then a failure, and last what the launcher itself terminated.
    """

    def weight(item: tuple[int, int]) -> tuple[int, int]:
        rank, code = item
        order = 3 if code == -signal.SIGTERM else 0 if code < 0 else 1 if code == 2 else 2
        return order, rank

    return min(exitcodes.items(), key=weight)
