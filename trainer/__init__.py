"""Evershard's trainer: `python -m trainer [group=choice] [key=value ...]`."""

from checkpointing.printing import open_closed_streams, quiet_libraries

open_closed_streams()
quiet_libraries()  # before any of them is imported
