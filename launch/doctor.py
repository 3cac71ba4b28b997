"""`python -m launch doctor`: what of this machine, or of every machine of an allocation, would stop a run."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import uuid
from pathlib import Path

from launch.checks import Check, devices, disk, locked_memory, memory, ports, shared_memory, visible
from launch.command import python
from launch.health import meet
from launch.port import port_for
from launch.scheduler import ask
from trainer.errors import Refused

ENDPOINT, TOKEN = "EVERSHARD_DOCTOR_ENDPOINT", "EVERSHARD_DOCTOR_TOKEN"  # of one look at an allocation


def main(options: argparse.Namespace) -> int:
    """0 where nothing is to be mended."""
    if options.allocation and TOKEN not in os.environ:
        return _everywhere(options)
    where = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    found = [memory(), shared_memory(), locked_memory(), *disk(Path(options.dir)), ports(), *devices()]
    if TOKEN in os.environ:
        found += together(Path(options.dir))
    print("\n".join([where, *(f"  {one}" for one in found)]), flush=True)
    return int(any(one.ok is False for one in found))


def _everywhere(options: argparse.Namespace) -> int:
    if "SLURM_JOB_ID" not in os.environ:
        raise Refused("--allocation, and this is no SLURM job. Type `salloc -N2` first, or leave it out.")
    command = python("-m", "launch", "doctor", "--allocation", "--dir", options.dir)
    hosts = ask("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).splitlines()
    first, count = hosts[0], len(hosts)
    address = re.search(r"NodeAddr=(\S+)", ask("scontrol", "show", "node", first))
    endpoint = f"{address[1] if address else first}:{port_for(int(os.environ['SLURM_JOB_ID']) + 1)}"
    words = ["srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", *command]
    environment = {**os.environ, ENDPOINT: endpoint, TOKEN: uuid.uuid4().hex}
    return subprocess.run(words, env=environment).returncode


def together(directory: Path) -> list[Check]:
    """The checks that need several machines: that each sees the others' files, and reaches them."""
    rank, size = (int(os.environ[f"SLURM_{key}"]) for key in ("PROCID", "NTASKS"))
    why, _ = meet(os.environ[ENDPOINT], rank, size, "")
    sum_up = Check("collective", not why, why or f"{size} machines sum together", "Look at the network and its rules")
    return [visible(directory, os.environ[TOKEN], rank, size), sum_up]
