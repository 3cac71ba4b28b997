"""Coordinates and groups of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.worlds import SharedWorld
from trainer.parallel.mesh import Mesh
from trainer.plan import AXES, Topology

DEGREES = st.tuples(*(st.integers(1, 3) for _ in AXES))


@given(DEGREES)
def test_every_rank_has_coordinates_of_its_own(degrees: tuple[int, ...]) -> None:
    topology = Topology(**dict(zip(AXES, degrees, strict=True)))
    meshes = [Mesh(topology, rank, None) for rank in range(topology.size)]
    assert len({tuple(mesh.at(axis) for axis in AXES) for mesh in meshes}) == topology.size
    shares = [mesh.data_rank for mesh in meshes]
    assert sorted(set(shares)) == list(range(topology.data_size))
    assert all(shares.count(share) == topology.pp * topology.tp for share in shares)


def sums() -> list[float]:
    mesh = Mesh.of(Topology(dp_shard=2, tp=2), dist.get_rank(), torch.device("cpu"))
    assert mesh.whole is not None
    assert [mesh.at(axis) for axis in AXES] == list(mesh.whole.get_coordinate() or ())
    axes = [("tp",), ("dp_shard",), ("dp_shard", "tp"), ("pp", "dp_replicate"), ("pp", "tp")]
    return [float(mesh.sum(torch.tensor([10.0 ** dist.get_rank()]), *along)) for along in axes]


def test_sums_are_over_the_ranks_along_their_axes(world: SharedWorld) -> None:
    assert world.run(sums, 4) == [
        [11, 101, 1111, 1, 11],
        [11, 1010, 1111, 10, 11],
        [1100, 101, 1111, 100, 1100],
        [1100, 1010, 1111, 1000, 1100],
    ]
