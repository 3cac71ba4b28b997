"""`python -m launch.health RUN HOST:PORT`: one machine of a SLURM job, before training: itself, and a collective.

Each leaves a report in the directory of the attempt; the script's `admit` reads them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from launch.checks import failed, of_a_machine
from trainer.outcome import DIRECTORY

PATIENCE_S = 60


def main(argv: Sequence[str] | None = None) -> int:
    run, endpoint = (sys.argv[1:] if argv is None else argv)[:2]
    node, rank, size = os.environ["SLURMD_NODENAME"], *(int(os.environ[f"SLURM_{k}"]) for k in ("PROCID", "NTASKS"))
    report = Path(os.environ[DIRECTORY]) / f"health-{node}.json"
    own = json.loads((Path(run) / "launch" / "job.json").read_text(encoding="utf-8"))["health"]
    why = failed(of_a_machine(Path(run), own))
    together = meet(endpoint, rank, size, why)
    report.with_suffix(".new").write_text(
        json.dumps({"node": node, "why": why, "together": together}), encoding="utf-8"
    )
    report.with_suffix(".new").replace(report)
    return 0


def meet(endpoint: str, rank: int, size: int, why: str) -> str:
    """A sum over all machines, unless one of them is not well by itself; why it failed."""
    import torch
    import torch.distributed as dist

    host, _, port = endpoint.rpartition(":")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), size, rank == 0, timedelta(seconds=PATIENCE_S), wait_for_workers=False
        )
        store.set(f"well-{rank}", "" if why else "yes")
        store.wait([f"well-{other}" for other in range(size)], timedelta(seconds=PATIENCE_S))
        if all(store.get(f"well-{other}") for other in range(size)):
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S)
            )
            ones = torch.ones(1024, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(ones)
            right = bool((ones == size).all())
            dist.destroy_process_group()
            if not right:
                return f"a sum over {size} machines is wrong"
        # The first machine keeps the store until all have read it.
        store.add("done", 1)
        if rank == 0:
            with contextlib.suppress(RuntimeError):
                _await(store, size)
    except (RuntimeError, ValueError) as error:  # of which torch's are
        return f"the machines do not reach each other at {endpoint}: {str(error).splitlines()[0]}"
    return ""


def _await(store: object, size: int) -> None:
    import time

    deadline = time.monotonic() + PATIENCE_S
    while store.add("done", 0) < size and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.05)


def reports(directory: Path, nodes: Sequence[str]) -> dict[str, str]:
    """Why each machine cannot be used; empty where it can. One without a report could not even say so."""
    found: dict[str, dict[str, str]] = {}
    for node in nodes:
        with contextlib.suppress(OSError, ValueError):
            found[node] = json.loads((directory / f"health-{node}.json").read_text(encoding="utf-8"))
    alone = {node: found[node]["why"] if node in found else "it did not report" for node in nodes}
    if any(alone.values()):
        return alone
    together = {node: found[node]["together"] for node in nodes}
    if all(together.values()) and len(nodes) > 1:
        # All say that they reach nobody: without the first, where they would have met, the others may.
        return {node: why if node != nodes[0] else "" for node, why in together.items()}
    return together


if __name__ == "__main__":
    sys.exit(main())
