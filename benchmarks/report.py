"""What a benchmark prints, the same for all: rows with quartiles, a ratio, a bar, and an exit status."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure. `ok` is None for a row that was run at another size, or without its peer."""

    name: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str | None
    ratio: float | None  # ours over the peer's
    better: str  # lower or higher
    bar: float | None  # of the ratio where there is a peer, else of our own figure
    ok: bool | None
    ours_quartiles: tuple[float, float] | None = None
    peer_quartiles: tuple[float, float] | None = None


def compared(
    name: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    *,
    bar: float | None,
    full: bool = True,
) -> Row:
    """A row for two interleaved series, of which lower is better; `full` is False for a run cut down.

    The ratio is the median over pairs taken one after the other, so that what slows the machine slows both.
    """
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return Row(
        name,
        unit,
        statistics.median(ours),
        statistics.median(peer),
        peer_name,
        ratio,
        "lower",
        bar,
        ratio <= bar if full and bar is not None else None,
        _quartiles(ours),
        _quartiles(peer),
    )


def absolute(name: str, unit: str, ours: float, *, better: str, bar: float, full: bool = True) -> Row:
    """A row whose bar is of the figure itself."""
    reached = ours <= bar if better == "lower" else ours >= bar
    return Row(name, unit, ours, None, None, None, better, bar, reached if full else None)


def options_of(
    parser: argparse.ArgumentParser, quick: Mapping[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """What was typed. With `--quick` the options of a short run take the defaults' places, and nothing is judged."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help=f"within a minute, judged by nothing: {dict(quick)}")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args(argv)


def finish(benchmark: str, rows: Sequence[Row], *, as_json: bool) -> int:
    """Print the rows; the exit status is 1 if any misses its bar."""
    report: dict[str, Any] = {"benchmark": benchmark, "machine": machine(), "rows": [asdict(row) for row in rows]}
    if as_json:
        print(json.dumps(report, allow_nan=False))
    else:
        print(f"{benchmark} on {report['machine']}")
        for row in rows:
            against = f", {row.peer_name} {row.peer:.4g}, ratio {row.ratio:.3f}" if row.peer is not None else ""
            verdict = {True: "reached", False: "NOT REACHED", None: "not judged"}[row.ok]
            print(f"  {row.name}: {row.ours:.4g} {row.unit}{against}; bar {row.bar} {row.better}: {verdict}")
    sys.stdout.flush()
    return int(any(row.ok is False for row in rows))


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{cores()} cores, {model}, Python {platform.python_version()}, torch {_torch_version()}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    first, _, third = statistics.quantiles(values, n=4)
    return first, third
