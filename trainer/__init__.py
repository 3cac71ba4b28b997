"""Evershard's trainer: `python -m trainer [group=choice] [key=value ...]`."""
