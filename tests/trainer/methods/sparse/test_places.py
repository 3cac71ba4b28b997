"""Entries in shards of any form: written, read and put back there, whole on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import Piece
from tests.harness.worlds import SharedWorld
from trainer.methods.entries import added
from trainer.methods.sparse.layer import at, values_shape
from trainer.methods.sparse.places import EntryPlace, assemble, put_back
from trainer.options.method import Granularity

SHAPE = (5, 6)


def pieces(whole: torch.Tensor, cut: tuple[int, int]) -> list[Piece]:
    """Four boxes, as views of copies."""
    found = []
    for top, bottom in ((0, cut[0]), (cut[0], SHAPE[0])):
        for left, right in ((0, cut[1]), (cut[1], SHAPE[1])):
            found.append(Piece("w", whole[top:bottom, left:right].clone(), (top, left), SHAPE))
    return found


def joined(parts: list[Piece]) -> torch.Tensor:
    return assemble(parts, None, torch.device("cpu"), shape=SHAPE)


@given(
    st.sampled_from(list(Granularity)),
    st.tuples(st.integers(0, 5), st.integers(0, 6)),
    st.data(),
)
def test_written_read_and_reverted_however_a_weight_is_cut(
    granularity: Granularity, cut: tuple[int, int], data: st.DataObject
) -> None:
    size = {Granularity.element: 30, Granularity.inputs: 6, Granularity.outputs: 5}[granularity]
    indices = torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1)))), dtype=torch.int32)
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    originals = at(whole, indices, granularity)
    values = torch.arange(originals.numel()).reshape(originals.shape) + 1.0
    parts = pieces(whole, cut)
    place = EntryPlace(parts, indices, granularity)
    assert torch.equal(place.read(originals, None), originals)
    place.write(originals, values)
    after = joined(parts)
    assert torch.equal(at(after, indices, granularity), originals + values)
    changed = after != whole
    assert int(changed.sum()) == originals.numel()
    place.revert(originals)
    assert torch.equal(joined(parts), whole)
    assert values_shape(SHAPE, granularity, indices.numel()) == tuple(originals.shape)


def test_what_is_unchanged_stays_bit_for_bit() -> None:
    base = torch.tensor([-0.0, 0.0, 1e-40, 3.0])
    assert torch.equal(added(base, torch.zeros(4)).view(torch.int32), base.view(torch.int32))
    low = torch.tensor([1.0, -2.5]).bfloat16()
    assert added(low, torch.tensor([0.0, 1e-9])).dtype is torch.bfloat16


def of_two_ranks() -> tuple[list[list[float]], list[float], list[list[float]]]:
    rank, group = dist.get_rank(), dist.group.WORLD
    whole = torch.arange(30.0).reshape(SHAPE) * (-1) ** torch.arange(30).reshape(SHAPE)
    mine = [p for number, p in enumerate(pieces(whole, (2, 3))) if number % 2 == rank or number == 0]
    together = assemble(mine, group, torch.device("cpu"))
    indices = torch.tensor([0, 7, 29])
    read = EntryPlace(mine, indices, Granularity.element).read(torch.zeros(3), group)
    put_back(mine, together * 2)
    return together.tolist(), read.tolist(), assemble(mine, group, torch.device("cpu")).tolist()


def test_ranks_have_together_what_each_has_a_part_of(world: SharedWorld) -> None:
    whole = torch.arange(30.0).reshape(SHAPE) * (-1) ** torch.arange(30).reshape(SHAPE)
    for together, read, twice in world.run(of_two_ranks, 2):
        assert together == whole.tolist() and twice == (2 * whole).tolist()
        assert read == whole.view(-1)[[0, 7, 29]].tolist()
