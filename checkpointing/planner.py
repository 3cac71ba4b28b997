"""One plan for all ranks: rank 0 makes it from their layouts when one of them has changed since the last save."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from checkpointing.collective import Team
from checkpointing.format import LogicalTensor, digest
from checkpointing.geometry import Box
from checkpointing.plan import RankPlan, Row, SavePlan, plan_save

REMEMBERED = 8  # layouts of this process: a run that saves several models takes turns between them

# By the digest of this rank's own layout: the digest of all ranks' layouts the last time, and its share of the plan.
_plans: OrderedDict[str, tuple[str, RankPlan]] = OrderedDict()


def agree_on_plan(team: Team, rows: Sequence[Row]) -> RankPlan:
    """This rank's share of the plan; the same object again while no rank's layout changes. Collective.

    The digest covers every name, dtype, shape and box in order, and the ranks they are on. A plan is used again only
    where every rank remembers it under the digest of all, so a rank that is new, or has forgotten, costs an exchange.
    """
    text = json.dumps(rows, separators=(",", ":"))
    own = digest(f"{team.rank} {text}".encode())
    remembered = _plans.get(own)
    found = team.together(lambda: [own, remembered[0] if remembered else ""])
    everyone = digest("".join(mine for mine, _ in found).encode())
    if remembered and all(known == everyone for _, known in found):
        _plans.move_to_end(own)
        return remembered[1]
    plan = _make(team, text)
    _plans[own] = (everyone, plan)
    _plans.move_to_end(own)
    while len(_plans) > REMEMBERED:
        _plans.popitem(last=False)
    return plan


def forget() -> None:
    """As in a new process."""
    _plans.clear()


def _make(team: Team, text: str) -> RankPlan:
    """Texts travel unread by those who need not: only rank 0 reads all layouts, and each rank only its own share."""
    texts = team.together(lambda: text)

    def plan() -> list[str] | None:
        if team.rank != 0:
            return None
        return _encode(plan_save([json.loads(layout) for layout in texts]))

    tensors, *shares = team.together(plan)[0]
    return _decode(json.loads(tensors), json.loads(shares[team.rank]))


def _encode(plan: SavePlan) -> list[str]:
    tensors = [[name, tensor.dtype, tensor.shape] for name, tensor in plan.tensors.items()]
    number = {name: n for n, name in enumerate(plan.tensors)}
    shares = [
        {"boxes": [[number[name], box.offset, box.size] for name, box in boxes], "scalars": scalars}
        for boxes, scalars in zip(plan.boxes, plan.scalars, strict=True)
    ]
    return [json.dumps(part, separators=(",", ":")) for part in (tensors, *shares)]


def _decode(tensors: list[Any], share: dict[str, Any]) -> RankPlan:
    names = [name for name, _, _ in tensors]
    return RankPlan(
        {name: LogicalTensor(dtype, tuple(shape)) for name, dtype, shape in tensors},
        [(names[number], Box(tuple(offset), tuple(size))) for number, offset, size in share["boxes"]],
        share["scalars"],
    )
