"""Start the trainer: `python -m launch local --nproc N -- [overrides]`. Knows nothing of tensors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Installed packages may share the names of ours: those beside this one come first.
if sys.path[0] != str(ROOT):
    sys.path.insert(0, str(ROOT))
