"""`python -m trainer`: one process, or every process that torchrun or `python -m launch` starts.

Exit status: 0 finished, 2 refused (nothing was started), anything else a failure. Started by its path, as in
`python path/to/trainer`, it is this package that runs, whatever else is called `trainer` on this machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Started by path: Python put this directory first on the path, where the directory above it belongs.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.elastic.preemption import note_early

if __name__ == "__main__":
    note_early()

    from trainer.cli import main  # seconds of imports
    from trainer.process import run_as_process

    run_as_process(main)
