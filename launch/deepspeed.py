"""The `deepspeed` launcher: its command, and the exit status that the trainer had."""

from __future__ import annotations

import os
import subprocess

import torch

from launch.command import TRAINER, Command, python, threads
from launch.options import Call, check_file, check_sizes
from launch.port import port_for
from launch.supervise import supervise
from trainer.options.launch import DeepspeedLaunch


def check(call: Call) -> None:
    options = call.config.launch
    assert isinstance(options, DeepspeedLaunch)
    if options.hostfile:
        remedy = "Give DeepSpeed's list of `HOST slots=N` lines."
        check_file(call, "--hostfile", options.hostfile, remedy, instead_of=["--nproc"])
    else:
        check_sizes(call.config, [options.nproc])


def plan(call: Call) -> Command:
    options = call.config.launch
    assert isinstance(options, DeepspeedLaunch)
    here = [f"--num_gpus={options.nproc}", "--master_addr=127.0.0.1"]  # it calls every process a GPU
    where = [f"--hostfile={options.hostfile}"] if options.hostfile else here
    # The trainer has its place from the environment; Hydra knows no --local_rank.
    # A port that two jobs share would make one world of them.
    port = options.port or (29500 if options.hostfile else port_for(os.getpid()))
    where += [f"--master_port={port}", "--no_local_rank", "--log_level=error"]
    chosen = [] if any(word.startswith("parallel=") for word in call.overrides) else ["parallel=zero2"]
    environment = threads(options.nproc)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    words = python("-m", "deepspeed.launcher.runner", *where, str(TRAINER), *chosen, *call.overrides)
    return Command(words, environment)


def run(call: Call, command: Command) -> int:
    return run_program(call, command)


def run_program(call: Call, command: Command) -> int:
    """A launcher as a program of its own, whose trainers get every signal from here."""

    def start() -> int:
        # In a session of its own: a terminal's signals reach the trainers once, and the launcher not at all.
        done = subprocess.run(command.words, env={**os.environ, **command.environment}, start_new_session=True)
        return done.returncode if done.returncode >= 0 else 128 - done.returncode

    elastic = call.config.elastic
    return supervise(start, warning=elastic.signal, grace_s=elastic.grace_s)
