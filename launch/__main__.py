"""`python -m launch local --nproc N [--dry-run] -- [overrides]`: exits with the trainer's status.

Overrides that do not compose are refused with status 2 before anything is started.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from launch.local import command_line, run_local
from trainer.compose import compose
from trainer.config import Config
from trainer.errors import Refused
from trainer.plan import plan_batch, resolve_topology


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    options, overrides = parse(argv[:cut]), argv[cut + 1 :]
    try:
        check(compose([o for o in overrides if is_override(o)]), options.nproc)
    except Refused as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print(command_line(options.nproc, overrides))
        return 0
    return run_local(options.nproc, overrides)


def parse(options: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch", description=__doc__)
    targets = parser.add_subparsers(dest="target", required=True)
    local = targets.add_parser("local", help="processes on this machine")
    local.add_argument("--nproc", type=int, default=1, metavar="N", help="how many (default 1)")
    local.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parsed = parser.parse_args(options)
    if parsed.nproc < 1:
        parser.error(f"--nproc {parsed.nproc}: start at least one process")
    return parsed


def is_override(word: str) -> bool:
    """Whether a word is an override and not one of Hydra's flags or a flag's value, as in `--cfg job`."""
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def check(config: Config, num_processes: int) -> None:
    """What the trainer would refuse about the number of processes, refused once and early."""
    plan_batch(config, resolve_topology(config.parallel, num_processes).data_size)


if __name__ == "__main__":
    sys.exit(main())
