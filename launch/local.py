"""Processes on this machine, by torchrun."""

from __future__ import annotations

from launch.command import Command
from launch.options import Call, check_sizes
from launch.torchrun import ALONE, command_of, patient, run_torchrun


def check(call: Call) -> None:
    check_sizes(call.config, [call.config.launch.nproc])


def plan(call: Call) -> Command:
    nproc = call.config.launch.nproc
    elastic = call.config.elastic
    flags = [*ALONE, f"--nproc-per-node={nproc}", *patient(elastic.signal, elastic.grace_s)]
    return command_of(flags, call.overrides, nproc)


def run(call: Call, command: Command) -> int:
    return run_torchrun(command, call.config)
