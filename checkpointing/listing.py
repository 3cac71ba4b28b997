"""`ls`: the generations that a directory means, as a table.

Without torch: of ten thousand generations the import would take longer than the answer.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

from checkpointing.errors import UnreadableError
from checkpointing.generations import Generation
from checkpointing.place import Place
from checkpointing.tree import human_bytes


def ls(place: Place, as_json: bool) -> int:
    """Print the generations of a place; the exit status says whether one is damaged."""
    storage, found = place.storage, place.generations
    rows: list[dict[str, Any]] = [
        {
            "generation": g.name,
            "step": g.step,
            "incarnation": g.manifest.incarnation if g.manifest else None,
            "ranks": g.manifest.world_size if g.manifest else None,
            "bytes": g.stored_bytes,
            "saved": g.manifest.created if g.manifest else None,
            "state": state_of(g),
            "damage": str(g.damage) if g.damage else None,
        }
        for g in found
    ]
    damaged = int(any(g.damage for g in found))
    if as_json:
        print(json.dumps({"directory": str(storage), "generations": rows}))
        return damaged
    print(f"{'generation':24} {'step':>8} {'incarnation':>11} {'ranks':>5} {'size':>9}  {'saved':19}  state")
    for row in rows:
        print(
            f"{row['generation']:24} {row['step']:>8} {_or_dash(row['incarnation']):>11} {_or_dash(row['ranks']):>5} "
            f"{human_bytes(row['bytes']):>9}  {when(row['saved']):19}  {row['state']}"
            + (f": {row['damage']}" if row["damage"] else "")
        )
    return damaged


def state_of(generation: Generation) -> str:
    if not generation.committed:
        return "not committed"
    if generation.damage:
        return "unreadable" if isinstance(generation.damage, UnreadableError) else "damaged"
    return "abandoned" if generation.abandoned else "committed"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def when(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")[:19] + "Z"
