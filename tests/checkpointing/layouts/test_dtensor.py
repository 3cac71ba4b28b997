"""DTensors of any mesh as boxes: by arithmetic here, against torch's own shards on real processes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from checkpointing import Held, LayoutError, pieces_of
from checkpointing.layouts.dtensor import held_intervals, of_blocks
from tests.harness.worlds import SharedWorld


@settings(max_examples=200)
@given(st.data())
def test_coordinates_of_a_mesh_tile_the_tensor(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    mesh = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    kinds = [Replicate(), *(Shard(d) for d in range(len(shape)))]
    kinds += [_StridedShard(d, split_factor=k) for d in range(len(shape)) for k in (2, 3)]
    placements = tuple(data.draw(st.sampled_from(kinds)) for _ in mesh)
    count = np.zeros(shape, dtype=int)
    for coordinate in product(*map(range, mesh)):
        held = held_intervals([[(0, n)] for n in shape], mesh, coordinate, placements)
        for combination in product(*held):
            count[tuple(slice(start, start + length) for start, length in combination)] += 1
    replicas = np.prod([n for n, p in zip(mesh, placements, strict=True) if isinstance(p, Replicate)] or [1])
    assert (count == replicas).all()


def test_a_partial_tensor_is_refused() -> None:
    with pytest.raises(LayoutError, match="has no single value"):
        held_intervals([[(0, 4)]], (2,), (0,), (Partial(),))


def check_distributed(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: list) -> bool:
    mesh = init_device_mesh("cpu", mesh_shape)
    full = torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape)
    tensor = distribute_tensor(full, mesh, placements)
    pieces = pieces_of("w", tensor)
    return (
        all(torch.equal(p.tensor, full[p.box.slices((0,) * len(shape))]) and p.global_shape == shape for p in pieces)
        and sum(p.tensor.numel() for p in pieces) == tensor.to_local().numel()
    )


@pytest.mark.parametrize(
    ("shape", "mesh", "placements"),
    [
        ((7, 5), (4,), [Shard(0)]),
        ((7, 5), (4,), [Shard(1)]),
        ((3, 5), (4,), [Shard(0)]),  # the last rank holds nothing
        ((1, 9), (3,), [Shard(0)]),
        ((8, 6), (2, 2), [Replicate(), Shard(0)]),
        ((7, 6), (2, 2), [Shard(0), Shard(0)]),
        ((7, 6), (2, 2), [Shard(1), Shard(0)]),
        ((5, 4, 3), (2, 2), [Shard(2), Shard(1)]),
    ],
)
def test_pieces_are_the_shards_that_torch_makes(
    shape: tuple, mesh: tuple, placements: list, world: SharedWorld
) -> None:
    assert all(world.run(check_distributed, int(np.prod(mesh)), shape, mesh, placements))


def check_fsdp_over_tp() -> list[bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6))
    full = {name: p.detach().clone() for name, p in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    strided = any(isinstance(p, _StridedShard) for t in model.parameters() for p in t.placements)  # type: ignore[attr-defined]
    right = [
        torch.equal(piece.tensor, full[name][piece.box.slices((0,) * piece.tensor.dim())])
        for name, parameter in model.named_parameters()
        for piece in pieces_of(name, parameter.detach())
    ]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return [strided, *right]


def test_fsdp_over_tensor_parallel_is_strided_and_right(world: SharedWorld) -> None:
    assert all(all(result) for result in world.run(check_fsdp_over_tp, 4))


def test_a_state_with_a_value_for_each_block_of_a_row_is_held_where_its_parameter_is() -> None:
    held = Held((10, 12), [[(4, 3), (9, 1)], [(4, 8)]])
    assert of_blocks("s", held, (4, 8), (4, 8)) == held
    assert of_blocks("s", held, (4, 8), (4, 2)) == Held((10, 3), [[(4, 3), (9, 1)], [(1, 2)]])
    assert of_blocks("s", (9, 8), (10, 16), (10, 4)) == (9, 2)  # of a parameter that is padded
    for other in ((), (4,), (3, 8), (4, 3), (4, 0)):  # a step count, and states of other forms
        assert of_blocks("s", held, (4, 8), other) is None
    assert of_blocks("s", (9,), (10,), (1,)) is None  # a step count that is kept so
    for cut in ([(2, 8)], [(4, 6), (0, 2)]):
        with pytest.raises(LayoutError, match=r"s has a value for every 4 of a row, and its rows are cut within"):
            of_blocks("s", Held((10, 12), [[(0, 4)], cut]), (4, 8), (4, 2))
    values = torch.arange(8.0).view(4, 2)
    pieces = pieces_of("s", values, of_blocks("s", held, (4, 8), (4, 2)))
    assert [(p.offset, tuple(p.tensor.shape), p.global_shape) for p in pieces] == [
        ((4, 1), (3, 2), (10, 3)),
        ((9, 1), (1, 2), (10, 3)),
    ]
