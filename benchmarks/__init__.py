"""Measurements against peers or the machine's limits, each in one run: `python -m benchmarks.<name> [--json]`."""
