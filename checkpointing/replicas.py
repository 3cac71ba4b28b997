"""Copies of one box on several ranks: averaged where they drifted apart, compared where they should be equal."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import xxhash

from checkpointing.collective import Team
from checkpointing.errors import ReplicaError, first_few
from checkpointing.geometry import Box, Piece
from checkpointing.plan import Mean, RankPlan
from checkpointing.tensors import DTYPES, multiplied, row_bytes, tensor_bytes

EXCHANGED_BYTES = 16 * 1024 * 1024  # of all ranks together, at a time

Part = tuple[Mean, int, int]  # elements start to stop of an averaged box, row-major


def averaged(team: Team, plan: RankPlan, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with those that this rank writes as a mean replaced by the mean. Collective.

    Sums are made in double precision in the order of ranks, so that equal replicas keep their value. The means take the
    room of the boxes that this rank writes as such.
    """
    if not plan.means:
        return list(pieces)
    held = {(piece.name, piece.box): piece for piece in pieces}
    own = [mean for mean in plan.means if mean.writer == team.rank]
    found: dict[tuple[str, Box], Piece] = {}

    def make_room() -> None:
        for mean in own:
            piece = held[mean.name, mean.box]
            room = torch.empty(mean.box.size, dtype=piece.tensor.dtype)
            found[mean.name, mean.box] = Piece(mean.name, room, mean.box.offset, piece.global_shape)

    team.together(make_room)
    told: list[list[str]] = []
    for batch, following in pairwise([[], *_batches(plan, EXCHANGED_BYTES // team.size), []]):

        def exchange(batch: list[Part] = batch, following: list[Part] = following, told: Any = told) -> list[str]:
            """Exchange a batch with all ranks; a failure in the last one, or in preparing the next, is told to all."""
            for number, (mean, start, stop) in enumerate(batch):
                if mean.writer == team.rank:
                    parts = [told[rank][number] for rank in mean.holders]
                    found[mean.name, mean.box].tensor.view(-1)[start:stop] = _mean(parts, plan, mean)
            return [_part(part, held, team.rank) for part in following]

        told = team.together(exchange)
    return [found.get((piece.name, piece.box), piece) for piece in pieces]


def _mean(parts: Sequence[str], plan: RankPlan, mean: Mean) -> torch.Tensor:
    dtype = DTYPES[plan.tensors[mean.name].dtype]
    values = (torch.frombuffer(bytearray(base64.b64decode(part)), dtype=dtype).to(torch.float64) for part in parts)
    return (sum(values) / len(parts)).to(dtype)  # type: ignore[union-attr]


def _batches(plan: RankPlan, limit: int) -> Iterator[list[Part]]:
    """All averaged elements, about `limit` bytes of a rank at a time."""
    batch: list[Part] = []
    room = limit
    for mean in plan.means:
        itemsize = plan.tensors[mean.name].itemsize
        step = max(1, limit // itemsize)
        for start in range(0, mean.box.numel, step):
            stop = min(start + step, mean.box.numel)
            if batch and (stop - start) * itemsize > room:
                yield batch
                batch, room = [], limit
            batch.append((mean, start, stop))
            room -= (stop - start) * itemsize
    if batch:
        yield batch


def _part(part: Part, held: dict[tuple[str, Box], Piece], rank: int) -> str:
    mean, start, stop = part
    if rank not in mean.holders:
        return ""
    piece = held[mean.name, mean.box]
    return base64.b64encode(tensor_bytes(multiplied(piece.tensor.reshape(-1)[start:stop], piece.divisor))).decode()


def check_replicas(team: Team, plan: RankPlan, pieces: Sequence[Piece]) -> None:
    """`ReplicaError` on all ranks unless every box has the same bytes wherever it is held. Collective.

    Every rank reads once what others hold too, of a layout without replicas nothing. Averaged pieces may differ.
    """
    shared = [piece for piece in pieces if (piece.name, piece.box) in plan.shared and piece.tensor.numel()]
    seen: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, told in enumerate(team.together(lambda: [(_key(piece), digest_of(piece)) for piece in shared])):
        for key, found in told:
            seen[key][found].append(rank)
    if not (differing := [(key, list(by.values())) for key, by in sorted(seen.items()) if len(by) > 1]):
        return
    names = {_key(piece): f"{piece.name} at {piece.offset}" for piece in pieces}
    told = [
        f"{names.get(key, key)} ({' against '.join(_ranks(group) for group in sorted(groups, key=len, reverse=True))})"
        for key, groups in differing
    ]
    raise ReplicaError(
        f"replicas of {len(differing)} boxes differ: {first_few(told)}. Nothing was saved. Ranks that should hold the "
        "same values have drifted apart, as where a chip computes wrongly; with check_replicas=False one rank's copy "
        "is saved"
    )


def _key(piece: Piece) -> str:
    """Name a box shortly: all ranks exchange these."""
    return xxhash.xxh3_64_hexdigest(repr((piece.name, piece.offset, piece.box.size)).encode())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {first_few([str(rank) for rank in ranks])}"


def digest_of(piece: Piece) -> str:
    hasher = xxhash.xxh3_128()
    for part in row_bytes(piece.tensor, divisor=piece.divisor):
        hasher.update(part)
    return hasher.hexdigest()
