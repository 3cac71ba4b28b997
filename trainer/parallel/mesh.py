"""Where a process stands in the parallel dimensions, and with whom it communicates in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.plan import AXES, Topology


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates, and the process groups along the axes; None for one process alone."""

    topology: Topology
    rank: int
    whole: DeviceMesh | None

    @staticmethod
    def of(topology: Topology, rank: int, device: torch.device) -> Mesh:
        """Collective."""
        shape = tuple(getattr(topology, axis) for axis in AXES)
        return Mesh(
            topology,
            rank,
            init_device_mesh(device.type, shape, mesh_dim_names=AXES) if topology.size > 1 else None,
        )

    def at(self, axis: str) -> int:
        """This rank's coordinate along an axis."""
        below = AXES[AXES.index(axis) + 1 :]
        step = 1
        for name in below:
            step *= getattr(self.topology, name)
        return self.rank // step % int(getattr(self.topology, axis))

    @property
    def data_rank(self) -> int:
        return self.at("dp_replicate") * self.topology.dp_shard + self.at("dp_shard")

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along these axes only; None where that is this rank alone."""
        axes = tuple(axis for axis in AXES if axis in axes and getattr(self.topology, axis) > 1)
        if self.whole is None or not axes:
            return None
        along = self.whole[axes] if len(axes) == 1 else self.whole[axes]._flatten("_".join(axes))
        return along.get_group()

    def sum(self, values: torch.Tensor, *axes: str) -> torch.Tensor:
        """The sum over the ranks along these axes, in place."""
        if (group := self.group(*axes)) is not None:
            dist.all_reduce(values, group=group)
        return values
