"""Measurements against peers or the machine's limits, each in one run: `python -m benchmarks.<name> [--json]`."""

from checkpointing.printing import quiet_libraries

quiet_libraries()  # of a peer's libraries nobody here can act upon what they warn of
