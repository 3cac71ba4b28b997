"""`python -m launch doctor`: what of this machine, or of every machine of an allocation, would stop a run."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

from launch.checks import devices, disk, locked_memory, memory, ports, shared_memory
from launch.command import python
from trainer.errors import Refused


def main(options: argparse.Namespace) -> int:
    """0 where nothing is to be mended."""
    if options.allocation and "SLURM_PROCID" not in os.environ:
        return _everywhere(options)
    where = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    found = [memory(), shared_memory(), locked_memory(), *disk(Path(options.dir)), ports(), *devices()]
    print("\n".join([where, *(f"  {one}" for one in found)]), flush=True)
    return int(any(one.ok is False for one in found))


def _everywhere(options: argparse.Namespace) -> int:
    if "SLURM_JOB_ID" not in os.environ:
        raise Refused("--allocation, and this is no SLURM job. Type `salloc -N2` first, or leave it out.")
    command = python("-m", "launch", "doctor", "--allocation", "--dir", options.dir)
    return subprocess.run(["srun", "--overlap", "--ntasks-per-node=1", *command]).returncode
