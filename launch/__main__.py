"""`python -m launch local|torchrun|deepspeed|accelerate|slurm [options] -- [overrides]`: starts the trainer.

Each prints with --dry-run exactly what it would run, and exits with the trainer's status: 0 finished, 2 refused, 75
preempted after a save (the same command goes on). Overrides that do not compose are refused with status 2 before
anything is started or submitted. `status RUN`, `follow RUN` and `cancel RUN` look after runs, and `doctor` after this
machine.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from trainer.elastic.preemption import listen_no_more, note_early, take_early

if __name__ == "__main__":
    note_early()  # seconds of imports and checks, until the trainers can be told

from launch.options import TARGETS, add_targets, read
from trainer.errors import Refused
from trainer.process import run_as_process


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    options, overrides = parse(argv[:cut]), argv[cut + 1 :]
    try:
        if options.command not in TARGETS:
            listen_no_more()
            from checkpointing.printing import printable_output  # what they tell is what others have written

            with printable_output():
                return int(importlib.import_module(f"launch.{options.command}").main(options))
        return start(options, overrides)
    except Refused as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def start(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    call = read(options.command, options, overrides)
    if call.dry_run or call.multirun or call.target == "slurm":
        if early := take_early():
            return 128 + early[0]
        listen_no_more()
    # A module a target: `check` refuses, `plan` says what is run, `run` runs it.
    target = importlib.import_module(f"launch.{call.target}")
    if call.multirun:
        from launch.sweep import run_points

        return run_points(call)
    target.check(call)
    command = target.plan(call)
    if call.dry_run:
        print(command)
        return 0
    return int(target.run(call, command))


def parse(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_targets(commands)
    for name, about in {
        "status": "where a run or a sweep is, by its files",
        "follow": "print what a job prints, until it ends",
        "cancel": "cancel the job of a run",
    }.items():
        commands.add_parser(name, help=about).add_argument("run", help="its directory")
    doctor = commands.add_parser("doctor", help="what of this machine would stop a run, and what to mend")
    doctor.add_argument("--dir", default=".", help="where runs write (default: here)")
    doctor.add_argument("--allocation", action="store_true", help="all machines of the SLURM job that this runs in")
    return parser.parse_args(options)


if __name__ == "__main__":
    run_as_process(main)
