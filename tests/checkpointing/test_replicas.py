"""Replicas: the mean of those that drifted apart, and the comparison of those that should not have."""

from __future__ import annotations

import pytest
import torch

from checkpointing import Piece, ReplicaError, load, replicas, save
from checkpointing.collective import Team
from checkpointing.stores import MemoryStorage
from tests.harness.threads import all_of, on_ranks


def drifted(rank: int, dtype: torch.dtype = torch.float32) -> list[Piece]:
    """Ranks 0 and 2 hold the first three rows, rank 1 the last two alone; and all a scalar."""
    values = torch.arange(15.0).reshape(5, 3)
    rows = slice(3, 5) if rank == 1 else slice(0, 3)
    local = (values[rows] + rank).to(dtype)
    return [
        Piece("w", local, (rows.start, 0), (5, 3), mean=True),
        Piece("s", torch.tensor(float(rank)), (), (), mean=True),
        Piece("same", torch.ones(4), (0,), (4,)),
    ]


@pytest.mark.parametrize("limit", [4, 16, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_what_drifted_apart_is_stored_as_the_mean(
    monkeypatch: pytest.MonkeyPatch, limit: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(replicas, "EXCHANGED_BYTES", limit)
    storage = MemoryStorage()
    all_of(on_ranks(3, lambda team: save(storage, 1, drifted(team.rank, dtype), group=team)))
    expected = torch.arange(15.0).reshape(5, 3) + 1  # 0 and 2 on average, and 1

    def loaded(team: Team) -> list[torch.Tensor]:
        target = [
            Piece(p.name, torch.zeros_like(p.tensor), p.offset, p.global_shape, mean=p.mean)
            for p in drifted(team.rank, dtype)
        ]
        load(storage, target, group=team)
        return [p.tensor for p in target]

    for rank, (w, s, same) in enumerate(all_of(on_ranks(3, loaded))):
        assert torch.equal(w, expected[slice(3, 5) if rank == 1 else slice(0, 3)].to(dtype))
        assert s.item() == 1 and same.tolist() == [1] * 4


def test_a_mean_leaves_the_ranks_tensors_alone() -> None:
    storage, mine = MemoryStorage(), [drifted(rank) for rank in range(3)]
    all_of(on_ranks(3, lambda team: save(storage, 1, mine[team.rank], group=team)))
    assert all(torch.equal(a.tensor, b.tensor) for r in range(3) for a, b in zip(mine[r], drifted(r), strict=True))


def copies(rank: int, changed: int | None = None) -> list[Piece]:
    tensor = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    if rank == changed:
        tensor = tensor + 1e-6 * (tensor == 5)
    return [Piece("w", tensor, (0, 0), (3, 2)), Piece("own", torch.full((1,), float(rank)), (rank,), (3,))]


def test_replicas_are_compared_and_the_ranks_that_differ_named() -> None:
    storage = MemoryStorage()
    all_of(on_ranks(3, lambda team: save(storage, 1, copies(team.rank), group=team)))
    found = on_ranks(3, lambda team: save(storage, 2, copies(team.rank, 2), group=team))
    assert all(isinstance(error, ReplicaError) for error in found)
    assert all("w at (0, 0) (ranks 0, 1 against rank 2)" in str(error) for error in found)
    assert not any(name.startswith("step-00000002") for name in storage.list())
    # Without the comparison one rank's copy is the truth.
    all_of(on_ranks(3, lambda team: save(storage, 2, copies(team.rank, 2), group=team, check_replicas=False)))


def test_only_what_others_hold_too_is_read_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()
    digest_of = replicas.digest_of
    monkeypatch.setattr(replicas, "digest_of", lambda piece: read.append(piece.name) or digest_of(piece))  # type: ignore[func-returns-value]
    storage = MemoryStorage()
    all_of(on_ranks(3, lambda team: save(storage, 1, copies(team.rank), group=team)))
    assert read == ["w"] * 3
    read.clear()
    all_of(on_ranks(3, lambda team: save(storage, 2, drifted(team.rank), group=team)))
    assert read == ["same"] * 3


def test_what_is_divided_is_compared_by_what_it_stands_for() -> None:
    """A bias held divided by two on one rank and whole on another is the same bias."""

    def bias(rank: int) -> list[Piece]:
        return [Piece("b", torch.full((2,), 3.0 / (1 + rank)), (0,), (2,), divisor=1 + rank)]

    storage = MemoryStorage()
    all_of(on_ranks(2, lambda team: save(storage, 1, bias(team.rank), group=team, check_replicas=True)))
    target = Piece("b", torch.zeros(2), (0,), (2,), divisor=4)
    load(storage, [target])
    assert target.tensor.tolist() == [0.75, 0.75]


def test_a_failure_while_averaging_is_one_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(replicas, "_mean", fails)  # which the writer alone computes
    found = on_ranks(3, lambda team: save(MemoryStorage(), 1, drifted(team.rank), group=team))
    assert all("no room" in str(error) for error in found)
