"""Evershard's trainer: `python -m trainer [group=choice] [key=value ...]`."""

from checkpointing.printing import quiet_libraries

quiet_libraries()  # before any of them is imported
