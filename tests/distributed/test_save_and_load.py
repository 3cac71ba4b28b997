"""Saving and loading over real process groups: any layout to any layout, and failures that all ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from checkpointing import MismatchError, PeerError, Piece, describe, load, save
from tests.checkpointing.layouts_for_tests import bits
from tests.worlds import WORLD

LAYOUTS = {"one": 1, "ddp": 2, "fsdp": 3, "hsdp": 4}


def build(layout: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A model (as it is called, and bare) with uneven sizes under a layout, and its optimizer."""
    torch.manual_seed(5)
    bare = nn.Sequential(nn.Linear(7, 150), nn.Linear(150, 131), nn.BatchNorm1d(131), nn.Linear(131, 1))
    called: nn.Module = bare
    if layout == "ddp":
        called = DistributedDataParallel(bare)
    elif layout in ("fsdp", "hsdp"):
        shape = (2, 2) if layout == "hsdp" else (1, dist.get_world_size())
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if layout == "hsdp" else mesh["shard"]
        fully_shard(bare[1], mesh=mesh)
        fully_shard(bare, mesh=mesh)
    return called, bare, torch.optim.AdamW(bare.parameters(), lr=0.01)


def step(called: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    called.train()
    called(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def train_and_save(layout: str, directory: Path) -> None:
    called, bare, optimizer = build(layout)
    for seed in range(3):
        step(called, optimizer, seed)
    save(directory, 3, describe(bare, optimizer), {"layout": layout})


def load_and_gather(layout: str, directory: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Load under another layout; this rank's pieces by name, with where they lie and their bytes."""
    called, bare, optimizer = build(layout)
    pieces = describe(bare, optimizer)
    load(directory, pieces)
    step(called, optimizer, 9)  # what was loaded can be trained on
    for module in bare.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    load(directory, pieces, step=3)  # and be loaded again, in place
    return {f"{p.name}{p.offset}": (tuple(p.tensor.shape), bits(p.tensor.detach())) for p in pieces}


@pytest.mark.parametrize("before", LAYOUTS)
def test_every_layout_loads_into_every_layout(before: str, tmp_path: Path) -> None:
    WORLD.run(train_and_save, LAYOUTS[before], before, tmp_path, environment=before == "one")
    (truth,) = WORLD.run(load_and_gather, 1, "one", tmp_path, environment=True)
    reference = {name.partition("(")[0]: value for name, value in truth.items()}
    for after, size in LAYOUTS.items():
        ranks = WORLD.run(load_and_gather, size, after, tmp_path, environment=after == "one")
        seen = dict.fromkeys(reference, 0)
        for pieces in ranks:
            for key, (shape, data) in pieces.items():
                name, _, at = key.partition("(")
                whole_shape, whole = reference[name]
                offset = tuple(int(n) for n in at.rstrip(")").split(",") if n.strip())
                assert data == part_of(whole, whole_shape, offset, shape, len(whole)), f"{before} to {after}: {key}"
                seen[name] += 1
        # The comparison can fail: another row is other bytes.
        shape, whole = reference["model/1.weight"]
        first, second = (part_of(whole, shape, (row, 0), (1, 150), len(whole)) for row in (0, 1))
        assert first != second
        assert all(seen.values()), f"{before} to {after}: nothing of {[n for n, c in seen.items() if not c]}"


def part_of(
    whole: bytes, whole_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], nbytes: int
) -> bytes:
    count = max(1, torch.Size(whole_shape).numel())
    raw = torch.frombuffer(bytearray(whole), dtype=torch.uint8).reshape(*whole_shape, nbytes // count)
    return bits(raw[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))])


def fail_on_one_rank(directory: Path) -> str:
    piece = Piece("model/w", torch.ones(2, 5), (2 * dist.get_rank(), 0), (2 * dist.get_world_size(), 5))
    save(directory, 1, [piece])
    wrong = Piece("model/w" if dist.get_rank() == 0 else "model/v", torch.zeros(2, 5), piece.offset, piece.global_shape)
    try:
        load(directory, [wrong])
    except MismatchError as error:
        return str(error)
    return "loaded"


def test_a_mismatch_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    messages = WORLD.run(fail_on_one_rank, 3, tmp_path)
    assert messages[0] == messages[2] == "rank 1: the checkpoint does not hold 1 of the tensors asked for: model/v"
    assert messages[1] in messages[0]


def cannot_write(directory: Path) -> str:
    path = directory if dist.get_rank() == 0 else Path("/proc/nowhere")
    try:
        save(path, 1, [Piece("model/w", torch.ones(2, 5), (2 * dist.get_rank(), 0), (6, 5))])
    except (PeerError, OSError) as error:
        return type(error).__name__
    return "saved"


def test_a_rank_that_cannot_write_fails_all(tmp_path: Path) -> None:
    assert WORLD.run(cannot_write, 3, tmp_path) == ["PeerError", "FileNotFoundError", "PeerError"]


def save_in_a_subgroup(directory: Path) -> list[float]:
    """Only ranks 0 and 1 save; rank 2 goes its own way."""
    pair = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return []
    local = torch.full((2, 5), float(dist.get_rank()))
    save(directory, 1, [Piece("model/w", local, (2 * dist.get_rank(), 0), (4, 5))], group=pair)
    target = torch.zeros(4, 5)
    load(directory, [Piece("model/w", target, (0, 0), (4, 5))], group=pair)
    return [float(v) for v in target[:, 0]]


def test_a_group_that_is_not_the_world(tmp_path: Path) -> None:
    assert WORLD.run(save_in_a_subgroup, 3, tmp_path) == [[0, 0, 1, 1], [0, 0, 1, 1], []]
