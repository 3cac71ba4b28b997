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
from trainer.resume import MEMORY_ID, make_memory_directory

NAMED_S = 60.0


def main(overrides: Sequence[str] | None = None) -> int:
    config = compose(sys.argv[1:] if overrides is None else overrides)
    name, deadline = Path(config.run.dir) / MEMORY_ID, time.monotonic() + NAMED_S
    while os.environ.get("SLURM_PROCID", "0") != "0" and not name.exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # the first machine's names it for all
    root = make_memory_directory(config)
    make_directory(root)
    with open(root / LOG, "ab") as log:
        os.utime(log.fileno())  # one is starting: trainers do not start another
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return keeper.main([str(root), "--keep", str(config.checkpoint.memory.keep_s)])


if __name__ == "__main__":
    sys.exit(main())
