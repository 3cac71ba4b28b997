"""`accelerate launch`: its command, and the exit status that the trainer had."""

from __future__ import annotations

from launch.command import TRAINER, Command, python, threads
from launch.deepspeed import run_program
from launch.options import Call, check_file, check_sizes
from trainer.options.launch import AccelerateLaunch
from trainer.options.precision import Compute


def check(call: Call) -> None:
    options = call.config.launch
    assert isinstance(options, AccelerateLaunch)
    if options.config_file:
        remedy = "`accelerate config` writes one."
        check_file(call, "--config-file", options.config_file, remedy, instead_of=["--nproc", "--port"])
    else:
        check_sizes(call.config, [options.nproc])


def plan(call: Call) -> Command:
    options = call.config.launch
    assert isinstance(options, AccelerateLaunch)
    where = [f"--num_processes={options.nproc}", f"--main_process_port={options.port}"]
    low = call.config.precision.compute
    where += [f"--mixed_precision={'no' if low is Compute.fp32 else low.name}", "--dynamo_backend=no"]
    where += ["--num_machines=1", "--main_process_ip=127.0.0.1"]
    where += ["--multi_gpu"] if options.nproc > 1 else []  # its name for several processes, on CPUs as well
    if options.config_file:
        where = [f"--config_file={options.config_file}"]
    chosen = [] if any(word.startswith("parallel=") for word in call.overrides) else ["parallel=accelerate"]
    words = python("-m", "accelerate.commands.launch", *where, str(TRAINER), *chosen, *call.overrides)
    return Command(words, threads(options.nproc))


def run(call: Call, command: Command) -> int:
    return run_program(call, command)
