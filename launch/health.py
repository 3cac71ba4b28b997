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
from typing import Any

from launch.checks import failed, of_a_machine
from trainer.outcome import DIRECTORY

PATIENCE_S = 60
OPTIONS = "EVERSHARD_JOB"  # the variable of the script that holds what its commands need to know, as JSON


def main(argv: Sequence[str] | None = None) -> int:
    run, endpoint = (sys.argv[1:] if argv is None else argv)[:2]
    node, rank, size = os.environ["SLURMD_NODENAME"], *(int(os.environ[f"SLURM_{k}"]) for k in ("PROCID", "NTASKS"))
    report = Path(os.environ[DIRECTORY]) / f"health-{node}.json"
    options = json.loads(os.environ[OPTIONS])
    why = failed(of_a_machine(Path(run), options["health"], options["gpus"]))
    together, missing = meet(endpoint, rank, size, why)
    said = {"node": node, "rank": rank, "why": why, "together": together, "missing": missing}
    report.with_suffix(".new").write_text(json.dumps(said), encoding="utf-8")
    report.with_suffix(".new").replace(report)
    return 0


def meet(endpoint: str, rank: int, size: int, why: str) -> tuple[str, list[int]]:
    """A sum over all machines, unless one of them is not well by itself; why it failed, and which did not come."""
    import torch
    import torch.distributed as dist

    host, _, port = endpoint.rpartition(":")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), size, rank == 0, timedelta(seconds=PATIENCE_S), wait_for_workers=False
        )
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store.set(f"well-{rank}", "" if why else backend)
        try:
            store.wait([f"well-{other}" for other in range(size)], timedelta(seconds=PATIENCE_S))
        except RuntimeError:
            missing = [other for other in range(size) if not store.check([f"well-{other}"])]
            return f"machines {missing} of {size} did not come to {endpoint} within {PATIENCE_S} s", missing
        said = {store.get(f"well-{other}").decode() for other in range(size)}
        if said == {"nccl", "gloo"}:
            return "some machines have GPUs, and others none", []
        if "" not in said:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S)
            )
            ones = torch.ones(1024, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(ones)
            right = bool((ones == size).all())
            dist.destroy_process_group()
            if not right:
                return f"a sum over {size} machines is wrong", []
        # The first machine keeps the store until all have read it.
        store.add("done", 1)
        if rank == 0:
            with contextlib.suppress(RuntimeError):
                _await(store, size)
    except (RuntimeError, ValueError) as error:  # of which torch's are
        return f"the machines do not reach each other at {endpoint}: {str(error).splitlines()[0]}", []
    return "", []


def _await(store: object, size: int) -> None:
    import time

    deadline = time.monotonic() + PATIENCE_S
    while store.add("done", 0) < size and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.05)


def reports(directory: Path, nodes: Sequence[str]) -> tuple[dict[str, str], str]:
    """Why machines cannot be used, those that cannot; and why all of them fail together, where none can be blamed.

    One without a report could not even say so. One that the others waited for in vain is blamed, and not the others.
    """
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        with contextlib.suppress(OSError, ValueError):
            found[node] = json.loads((directory / f"health-{node}.json").read_text(encoding="utf-8"))
    if bad := {node: why for node in nodes if (why := found[node]["why"] if node in found else "it did not report")}:
        return bad, ""
    together = next((one["together"] for one in found.values() if one["together"]), "")
    absent = {rank for one in found.values() for rank in one["missing"]}
    return {node: one["together"] or together for node, one in found.items() if one["rank"] in absent}, together


if __name__ == "__main__":
    sys.exit(main())
