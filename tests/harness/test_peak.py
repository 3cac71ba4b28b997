"""Counting memory by operations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.harness.peak import Peak
from tests.harness.worlds import SharedWorld


def test_the_most_that_lives_at_a_time_is_counted() -> None:
    held = torch.zeros(1000)
    with Peak([held, held[1:]]) as peak:  # a view has no memory of its own
        one = torch.zeros(500)
        del one
        two = held[:100] + 1
        assert peak.now == 4 * (1000 + 100)
    assert peak.most == 4 * (1000 + 500)
    assert two.numel() == 100


def test_what_is_shrunk_or_grown_in_place_counts_as_it_is() -> None:
    """FSDP2 gives memory back that way."""
    held = torch.zeros(1000)
    with Peak([held]) as peak:
        held.untyped_storage().resize_(0)
        torch.zeros(500)
        assert peak.most == 4 * 1000
        held.untyped_storage().resize_(4 * 2000)
        torch.zeros(100)
    assert peak.most == 4 * (2000 + 100)


def test_what_has_a_shape_alone_counts_nothing() -> None:
    with Peak([]) as peak, FakeTensorMode():
        kept = torch.zeros(1000), torch.zeros(1000, device="meta")
    assert peak.most == 0 and len(kept) == 2


def of_a_dtensor() -> tuple[int, int]:
    whole = torch.zeros(2, 1000)
    tensor = distribute_tensor(whole, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])
    del whole
    with Peak([tensor]) as peak:
        before = peak.now
        (tensor + 1).redistribute(placements=[Replicate()])
    return before, peak.most


def test_of_a_dtensor_the_local_part_counts_and_what_it_is_gathered_into(world: SharedWorld) -> None:
    for before, most in world.run(of_a_dtensor, 2):
        assert before == 4000
        assert 4000 * 4 <= most <= 4000 * 6  # its part, the sum's part, and both of that one
