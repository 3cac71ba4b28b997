"""`python -m checkpointing ls|inspect|verify|diff|export|import ...`: look at checkpoints, take models out and in.

DIR is a run directory, a directory of generations, one generation, or STORE://PLACE. Exit status: 0 sound, 1 damage
found, nothing to verify, or (diff) a difference, 2 DIR cannot be used. With --json an error is an object too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpointing.errors import CheckpointError, DamagedError, VersionError
from checkpointing.listing import ls
from checkpointing.place import find
from checkpointing.printing import open_closed_streams, printable_output, quiet_libraries
from checkpointing.stores import load_store

DTYPES = ("fp32", "bf16", "fp16")  # that an export rounds to


def main(argv: Sequence[str] | None = None) -> int:
    open_closed_streams()
    quiet_libraries()
    parser = argparse.ArgumentParser(prog="python -m checkpointing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("ls", "list the generations, newest first"),
        ("inspect", "show what one generation holds (the newest, or a generation's own directory)"),
        ("verify", "read everything and check every checksum"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("dir", metavar="DIR")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    commands.choices["inspect"].add_argument("--tensor", metavar="NAME", help="show where one tensor lies instead")
    command = commands.add_parser("diff", help="compare two generations tensor by tensor, however they were sharded")
    for side in ("a", "b"):
        command.add_argument(side, metavar=side.upper())
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command = commands.add_parser(
        "export", help="write the model for other programs, whatever layout it was saved under"
    )
    command.add_argument("dir", metavar="DIR")
    command.add_argument(
        "--to",
        choices=("hf", "torch", "dcp"),
        default="hf",
        help="a Hugging Face directory, a torch file, or a directory of torch.distributed.checkpoint with moments",
    )
    command.add_argument("out", type=Path, metavar="OUT")
    command.add_argument("--dtype", choices=DTYPES, help="round to this type (default: as it was trained)")
    command.add_argument("--config", type=Path, metavar="DIR", help="where config.json and the tokenizer are (hf)")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    command = commands.add_parser("import", help="make a generation of a checkpoint that another library wrote")
    command.add_argument("source", type=Path, metavar="SOURCE", help="of DeepSpeed, torch's DCP or Hugging Face")
    command.add_argument("dir", metavar="DIR", help="of generations, which are written there")
    command.add_argument("--trust-pickle", action="store_true", help="read descriptions that are pickles")
    command.add_argument("--step", type=int, metavar="N", help="which step is done (default: as the checkpoint says)")
    command.add_argument(
        "--ignore", action="append", default=[], metavar="PATH", help="leave out what lies under PATH (DCP; repeatable)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    for command in commands.choices.values():
        command.add_argument(
            "--store", type=Path, action="append", default=[], metavar="FILE", help="a Python file that has a store"
        )
    arguments = parser.parse_args(argv)
    with printable_output():
        return _answer(arguments)


def _answer(arguments: argparse.Namespace) -> int:
    """The exit status; what went wrong is one paragraph."""
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read has read enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left for the exit to write
        return 1
    except (CheckpointError, OSError) as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        print(f"checkpointing: {error}", file=sys.stderr)
        return 1 if isinstance(error, DamagedError | VersionError) else 2


def run(arguments: argparse.Namespace) -> int:
    for file in arguments.store:
        load_store(file)
    if arguments.command == "ls":
        return ls(find(arguments.dir), arguments.json)

    from checkpointing import commands  # seconds of imports

    if arguments.command == "diff":
        return commands.diff(find(arguments.a), find(arguments.b), arguments.json)
    if arguments.command == "import":
        return commands.take_in(arguments)
    place = find(arguments.dir)
    if arguments.command == "export":
        return commands.export(commands.open_newest(place), arguments)
    if arguments.command == "inspect":
        return commands.inspect(commands.open_newest(place), arguments.json, arguments.tensor)
    return commands.verify(place, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
