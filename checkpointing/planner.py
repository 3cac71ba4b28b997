"""One plan for all ranks: rank 0 makes it from their layouts when one of them has changed since the last time."""

from __future__ import annotations

import json
import socket
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from checkpointing.collective import Team
from checkpointing.completeness import check_nothing_left
from checkpointing.format import LogicalTensor, Manifest, digest
from checkpointing.geometry import Box
from checkpointing.plan import Mean, RankPlan, Row, SavePlan, collecting_later, plan_save, shared_boxes

REMEMBERED = 8  # layouts of this process: a run that saves several models takes turns between them

Result = TypeVar("Result")


class Agreement(Generic[Result]):
    """The agreement of all ranks about their layouts, remembered while no rank's layout changes.

    The digest covers every row in order, what else the result depends on, and the ranks they are on. A result is used
    again only where every rank remembers it under the digest of all, so a rank that is new, or has forgotten, costs an
    exchange; where nothing changed only digests travel.
    """

    def __init__(self) -> None:
        # By the digest of this rank's own layout: that layout, the digest of all ranks' the last time, and the result.
        self.remembered: OrderedDict[str, tuple[Sequence[Row], str, Result]] = OrderedDict()

    def reach(self, team: Team, rows: Sequence[Row], about: str, find: Callable[[str], Result]) -> Result:
        """The result for these layouts; `find` gets this rank's as text and is collective. Collective."""
        mark = f"{team.rank} of {team.size} {about} "
        own, text = self._digest(mark, rows)
        before = self.remembered.get(own)
        told = team.together(lambda: [own, before[1] if before else ""])
        everyone = digest("".join(mine for mine, _ in told).encode())
        if before and all(known == everyone for _, known in told):
            self.remembered.move_to_end(own)
            return before[2]
        with collecting_later():
            result = find(text or _as_text(rows))
        self.remembered[own] = (rows, everyone, result)
        self.remembered.move_to_end(own)
        while len(self.remembered) > REMEMBERED:
            self.remembered.popitem(last=False)
        return result

    def _digest(self, mark: str, rows: Sequence[Row]) -> tuple[str, str]:
        """The digest of a layout, and its text where it had to be made: comparing costs far less than writing."""
        for known, (before, _, _) in self.remembered.items():
            if known.startswith(mark) and before == rows:
                return known, ""
        text = _as_text(rows)
        return mark + digest(text.encode()), text


_plans: Agreement[RankPlan] = Agreement()
_complete: Agreement[None] = Agreement()


def agree_on_plan(team: Team, rows: Sequence[Row]) -> RankPlan:
    """This rank's share of the plan of a save; the same object again while no rank's layout changes. Collective."""
    return _plans.reach(team, rows, "save", lambda text: _plan(team, text))


def agree_on_completeness(team: Team, rows: Sequence[Row], manifest: Manifest) -> None:
    """`MismatchError` on all ranks if not all that a generation holds is asked for by some rank. Collective."""

    def check(text: str) -> None:
        texts = team.to_first(text)
        team.together(lambda: check_nothing_left([json.loads(t) for t in texts], manifest) if team.rank == 0 else None)

    _complete.reach(team, rows, f"load {manifest.save_id}", check)


def forget() -> None:
    """Forget the last plan, as a new process has none."""
    _plans.remembered.clear()
    _complete.remembered.clear()


def _as_text(rows: Sequence[Row]) -> str:
    return json.dumps(rows, separators=(",", ":"))


def _plan(team: Team, text: str) -> RankPlan:
    """Rank 0 alone hears all layouts, and each rank only its own share: what all heard would fill their memory."""
    told = team.to_first(json.dumps([socket.gethostname(), text]))
    parts: list[str] = []

    def plan() -> None:
        if team.rank == 0:
            layouts = [json.loads(one) for one in told]
            hosts = [host for host, _ in layouts]
            made = plan_save([json.loads(layout) for _, layout in layouts], [hosts.index(host) for host in hosts])
            parts.extend(_encode(made))

    team.together(plan)
    common, share = json.loads(team.from_first(lambda rank: f"[{parts[0]},{parts[1 + rank]}]"))
    return _decode(common, share, json.loads(text))


def _encode(plan: SavePlan) -> list[str]:
    common = {
        "tensors": [[name, tensor.dtype, tensor.shape, tensor.writers] for name, tensor in plan.tensors.items()],
        "aliases": plan.aliases,
        "means": [[mean.name, mean.box.offset, mean.box.size, mean.holders, mean.writer] for mean in plan.means],
    }
    number = {name: n for n, name in enumerate(plan.tensors)}
    shares = [
        {
            "boxes": [[number[name], box.offset, box.size] for name, box in boxes],
            "scalars": scalars,
            "cover": cover,
            "shared": f"{shared:x}",
        }
        for boxes, scalars, cover, shared in zip(plan.boxes, plan.scalars, plan.covers, plan.shared, strict=True)
    ]
    return [json.dumps(part, separators=(",", ":")) for part in (common, *shares)]


def _decode(common: dict[str, Any], share: dict[str, Any], rows: Sequence[Row]) -> RankPlan:
    names = [name for name, *_ in common["tensors"]]
    return RankPlan(
        tensors={
            name: LogicalTensor(dtype, tuple(shape), None if writers is None else tuple(writers))
            for name, dtype, shape, writers in common["tensors"]
        },
        aliases=common["aliases"],
        means=[
            Mean(name, Box(tuple(offset), tuple(size)), tuple(holders), writer)
            for name, offset, size, holders, writer in common["means"]
        ],
        boxes=[(names[number], Box(tuple(offset), tuple(size))) for number, offset, size in share["boxes"]],
        scalars=share["scalars"],
        cover=tuple((low, high) for low, high in share["cover"]),
        shared=shared_boxes(rows, int(share["shared"], 16)),
    )
