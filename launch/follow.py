"""`python -m launch follow RUN`: print what a run's SLURM job prints until it ends; the run's status is its own."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from checkpointing.small_files import read_text
from launch.job import ATTEMPTS
from launch.scheduler import OVER, release, state_of
from launch.status import Status
from trainer.errors import Refused
from trainer.track.files import read_lines

POLL_S = 1.0
AWAY = 60  # looks in a row at a controller that does not answer, before it is given up


def main(options: argparse.Namespace) -> int:
    run = Path(options.run)
    job = job_of(run)
    said, seen, away = "", 0, 0
    while True:
        try:
            state, reason = state_of(job)
            away = 0
        except Refused:
            away += 1
            if away > AWAY:
                raise
            time.sleep(POLL_S)
            continue
        if (now := f"{state} ({reason})" if state == "PENDING" else state) != said:
            print(f"launch: job {job}: {now or 'SLURM has forgotten it'}", file=sys.stderr, flush=True)
            said = now
        # It was requeued, and SLURM would wait for two minutes. One that has not begun may be told to begin later.
        if (state, reason) == ("PENDING", "BeginTime") and (run / "launch" / ATTEMPTS).exists():
            release(job)
        # The log of a point is the sweep's.
        log = next((p for home in (run, run.parent) if (p := home / "launch" / f"job-{job}.log").exists()), None)
        if log is not None:
            with open(log, "rb") as file:
                file.seek(seen)
                sys.stdout.buffer.write(file.read())
                sys.stdout.buffer.flush()
                seen = file.tell()
        if state in OVER:
            return how(run, state)
        time.sleep(POLL_S)


def how(run: Path, state: str) -> int:
    """0 for a run that is finished, and 1 otherwise."""
    try:
        found = Status.of(run)
    except Refused:
        found = Status("not started")
    if found.state == "finished":
        return 0
    ended = (read_lines(run / "launch" / ATTEMPTS) or [{}])[-1].get("ended", "")
    print(f"launch: {run} is not finished: {found.state}; {ended or state}", file=sys.stderr)
    return 1


def job_of(run: Path) -> str:
    try:
        return read_text(run / "launch" / "job").strip()
    except (OSError, ValueError):
        raise Refused(f"{run} was not handed to SLURM from here: it has no launch/job. Type its directory.") from None
