"""`python -m launch cancel RUN`: end the SLURM job of a run. What is committed stays."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.follow import job_of
from launch.scheduler import ask, state_of


def main(options: argparse.Namespace) -> int:
    job = job_of(Path(options.run))
    if not state_of(job)[0]:
        print(f"job {job} has ended long ago")
        return 0
    ask("scancel", job)
    print(f"job {job} is cancelled; what {options.run} has saved stays")
    return 0
