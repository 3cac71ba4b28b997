"""The console command `evershard train|ckpt|launch`: dispatches to `python -m trainer|checkpointing|launch`."""

from __future__ import annotations

import sys
from typing import NoReturn

from trainer.process import run_as_process


def main() -> int:
    """Run the named program with the rest of the command line; returns its exit status."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name == "train":
        from trainer.cli import main as program
    elif name == "ckpt":
        from checkpointing.__main__ import main as program
    elif name == "launch":
        from launch.__main__ import main as program
    else:
        print("usage: evershard train|ckpt|launch ...", file=sys.stderr)
        return 2
    return program()


def command() -> NoReturn:
    """The console command itself."""
    run_as_process(main)
