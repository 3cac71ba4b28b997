"""`python -m launch.keeper [overrides]`: the keeper of a run's snapshots, as a step of its own in a SLURM job.

Its secret is in a file of the run's directory in memory, for this user alone. The trainers find it listening there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from checkpointing.memory import keeper
from checkpointing.memory.directory import LOG, make_directory
from trainer.compose import compose
from trainer.identity import came_from
from trainer.resume import make_memory_directory, memory_directory

NAMED_S = 60.0


def main(overrides: Sequence[str] | None = None) -> int:
    config = compose(sys.argv[1:] if overrides is None else overrides)
    # The first machine's names it for all; that of a copied run is named by its trainer.
    names, deadline = os.environ.get("SLURM_PROCID", "0") == "0", time.monotonic() + NAMED_S
    names = names and not came_from(Path(config.run.dir))
    while not names and memory_directory(config) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    root = make_memory_directory(config)
    make_directory(root)
    with open(root / LOG, "ab") as log:
        os.utime(log.fileno())  # one is starting: trainers do not start another
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return keeper.main([str(root), "--keep", str(config.checkpoint.memory.keep_s)])


if __name__ == "__main__":
    sys.exit(main())
