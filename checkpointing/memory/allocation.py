"""The arenas of a node, allocated by all of its ranks together before anything is copied into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpointing.collective import Team
from checkpointing.errors import LayoutError
from checkpointing.geometry import Piece
from checkpointing.lease import this_machine
from checkpointing.memory.arena import Shards
from checkpointing.memory.image import Image
from checkpointing.memory.room import check_room
from checkpointing.plan import RankPlan


@dataclass(frozen=True)
class Node:
    """The ranks that share a directory in memory, and which of `count` nodes they are."""

    ranks: list[int]
    number: int
    count: int

    @staticmethod
    def of(team: Team, memory: Path) -> Node:
        """This rank's node. Collective."""
        places = [tuple(place) for place in team.together(lambda: [*this_machine(), str(memory)])]
        nodes = sorted(set(places), key=places.index)
        here = places[team.rank]
        return Node([rank for rank, place in enumerate(places) if place == here], nodes.index(here), len(nodes))


class Arenas:
    """A directory's arenas, `count` at most, each with a file of every rank of the node."""

    def __init__(self, team: Team, node: Node, memory: Path, count: int) -> None:
        self._team, self._node, self._memory, self._count = team, node, memory, count
        self._speaks = team.rank == node.ranks[0]
        self.shards = Shards(memory, team.rank)

    def lay_out(self, plan: RankPlan, pieces: Sequence[Piece]) -> Image:
        """Lay out this rank's file and allocate it in every arena. Collective.

        `LayoutError` with the arithmetic where they do not fit.
        """
        image: Image | None = None

        def measure() -> int:
            nonlocal image
            image = Image(plan, pieces, self._team.rank)
            return image.nbytes

        sizes = self._team.together(measure)
        assert image is not None
        nbytes = image.nbytes
        needed = sum(sizes[rank] for rank in self._node.ranks)
        self._team.together(lambda: self._check_room(needed) if self._speaks else None)
        self.shards.close()
        names = self._team.together(lambda: self._names() if self._speaks else [])[self._node.ranks[0]]
        self._team.together(lambda: self._allocate(names, nbytes))
        return image

    def _check_room(self, needed: int) -> None:
        """See that `count` snapshots of `needed` bytes fit, with what is there already."""
        try:
            there = sum(file.stat().st_blocks * 512 for file in self._memory.rglob("shard-*"))
        except OSError as error:
            raise LayoutError(f"{self._memory} cannot be read: {error}") from error
        more = self._count * needed - min(there, self._count * needed)
        arithmetic = (
            f"{self._count} snapshots of {needed / 1e9:.2f} GB by {len(self._node.ranks)} processes, of which "
            f"{there / 1e9:.2f} GB are there"
        )
        check_room(self._memory, more, arithmetic, pinned=self.shards.pinned)

    def _names(self) -> list[str]:
        try:
            return self.shards.names(self._count)
        except OSError as error:
            raise LayoutError(f"{self._memory} cannot be read: {error}") from error

    def _allocate(self, names: Sequence[str], nbytes: int) -> None:
        try:
            for arena in names:
                self.shards.of(arena, nbytes)
        except OSError as error:  # as ours: the others must take it for the same thing as this rank does
            raise LayoutError(f"snapshots do not fit into {self._memory}: {error}") from error
