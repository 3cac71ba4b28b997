"""Saving and loading over real process groups: any layout to any layout, and failures that all ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from checkpointing import LayoutError, MismatchError, PeerError, Piece, describe, load, pieces_of, save
from tests.checkpointing.layouts_for_tests import bits
from tests.harness.worlds import SharedWorld

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


Whole = dict[str, tuple[tuple[int, ...], bytes]]  # shape and bytes by name


def train_and_save(layout: str, directory: Path) -> Whole:
    """Train a little and save; the whole state that was saved, gathered by torch and named here."""
    called, bare, optimizer = build(layout)
    for seed in range(3):
        step(called, optimizer, seed)
    save(directory, 3, describe(bare, optimizer), {"layout": layout})
    truth = {f"model/{n}": p for n, p in bare.named_parameters()} | {f"buffer/{n}": b for n, b in bare.named_buffers()}
    for name, parameter in bare.named_parameters():
        truth |= {f"optim/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return {name: (tuple(t.shape), bits(gathered(t))) for name, t in truth.items()}


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def load_and_gather(layout: str, directory: Path) -> list[Whole]:
    """Load under another layout, before and after a step: this rank's pieces by name and where they lie."""
    called, bare, optimizer = build(layout)
    pieces = describe(bare, optimizer)
    load(directory, pieces)
    held = [held_by(pieces)]
    step(called, optimizer, 9)  # what was loaded can be trained on
    pieces = describe(bare, optimizer)
    load(directory, pieces, step=3)  # and be loaded again, in place
    return [*held, held_by(pieces)]


def held_by(pieces: list[Piece]) -> Whole:
    return {f"{p.name}{p.offset}": (tuple(p.tensor.shape), bits(p.tensor.detach())) for p in pieces}


@pytest.mark.smoke
@pytest.mark.parametrize("before", LAYOUTS)
def test_every_layout_loads_into_every_layout(before: str, tmp_path: Path, world: SharedWorld) -> None:
    truth = world.run(train_and_save, LAYOUTS[before], before, tmp_path, environment=before == "one")[0]
    assert len(truth) == 8 + 3 + 8 * 3  # parameters, buffers of the norm, three values of AdamW each
    for after, size in LAYOUTS.items():
        ranks = world.run(load_and_gather, size, after, tmp_path, environment=after == "one")
        for moment in (0, 1):
            check_held([held[moment] for held in ranks], truth, f"{before} to {after}")
    # The comparison can fail: the truth of another state is another.
    name = "optim/1.weight/exp_avg"
    shape, data = truth[name]
    with pytest.raises(AssertionError):
        check_held([held[0] for held in ranks], {**truth, name: (shape, bytes(len(data)))}, "other moments")


def check_held(ranks: list[Whole], truth: Whole, what: str) -> None:
    """Every piece of every rank is that part of the whole, and every element is held somewhere."""
    held = dict.fromkeys(truth, 0)
    for pieces in ranks:
        for key, (shape, data) in pieces.items():
            name, _, at = key.partition("(")
            whole_shape, whole = truth[name]
            offset = tuple(int(n) for n in at.rstrip(")").split(",") if n.strip())
            assert data == part_of(whole, whole_shape, offset, shape, len(whole)), f"{what}: {key}"
            held[name] += len(data)
    assert all(held[name] >= len(whole) for name, (_, whole) in truth.items()), what


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


def test_a_mismatch_on_one_rank_is_told_on_all(tmp_path: Path, world: SharedWorld) -> None:
    messages = world.run(fail_on_one_rank, 3, tmp_path)
    assert messages[0] == messages[2] == "rank 1: the checkpoint does not hold 1 of the tensors asked for: model/v"
    assert messages[1] in messages[0]


def cannot_write(directory: Path) -> str:
    path = directory if dist.get_rank() == 0 else Path("/proc/nowhere")
    try:
        save(path, 1, [Piece("model/w", torch.ones(2, 5), (2 * dist.get_rank(), 0), (6, 5))])
    except (PeerError, OSError) as error:
        return type(error).__name__
    return "saved"


def test_a_rank_that_cannot_write_fails_all(tmp_path: Path, world: SharedWorld) -> None:
    assert world.run(cannot_write, 3, tmp_path) == ["PeerError", "FileNotFoundError", "PeerError"]


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


def test_a_group_that_is_not_the_world(tmp_path: Path, world: SharedWorld) -> None:
    assert world.run(save_in_a_subgroup, 3, tmp_path) == [[0, 0, 1, 1], [0, 0, 1, 1], []]


def describe_after_a_forward(directory: Path) -> bool:
    """FSDP2 keeps the root gathered after a forward without a backward: copies, which a load must not fill."""
    _, bare, optimizer = build("fsdp")
    save(directory, 1, describe(bare, optimizer))
    reference = gathered(bare[0].weight).clone()
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.zero_()
        bare.eval()(torch.randn(4, 7))
    load(directory, describe(bare, optimizer))
    return torch.equal(gathered(bare[0].weight), reference)


def test_a_load_after_an_evaluation_reaches_the_shards(tmp_path: Path, world: SharedWorld) -> None:
    assert world.run(describe_after_a_forward, 2, tmp_path) == [True, True]


def describe_fsdp1() -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        describe(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")))
    except LayoutError as error:
        return str(error)
    return "described"


def test_flat_parameters_are_refused(world: SharedWorld) -> None:
    assert all("is a flat parameter of FSDP1" in said for said in world.run(describe_fsdp1, 2))


def round_trip_of_an_empty_tensor(directory: Path) -> list[tuple[int, ...]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(torch.zeros(0, 5), mesh, [Shard(0)])
    pieces = pieces_of("model/e", sharded)
    save(directory, 1, [*pieces, *pieces_of("model/w", torch.ones(2))])
    plain = [*pieces_of("model/e", torch.zeros(0, 5)), *pieces_of("model/w", torch.zeros(2))]
    load(directory, plain)
    save(directory, 2, plain)
    load(directory, [*pieces, *pieces_of("model/w", torch.zeros(2))])
    return [p.global_shape for p in pieces]


def test_an_empty_tensor_is_held_by_name(tmp_path: Path, world: SharedWorld) -> None:
    assert world.run(round_trip_of_an_empty_tensor, 2, tmp_path) == [[(0, 5)], [(0, 5)]]


def save_among_some(directory: str) -> list[float]:
    """Ranks 1 and 3 alone, in the group's own order; the first of them is rank 0 there."""
    group = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        return []
    place = dist.get_rank(group)
    rows = torch.full((2, 3), float(place))
    save(directory, 1, [Piece("w", rows, (2 * place, 0), (4, 3))], {"x": 1}, group)
    target = torch.zeros(2, 3)
    assert load(directory, [Piece("w", target, (2 - 2 * place, 0), (4, 3))], group=group) == {"x": 1}
    return target.unique().tolist()


def test_a_group_of_some_ranks_saves_and_loads_by_itself(tmp_path: Path, world: SharedWorld) -> None:
    assert world.run(save_among_some, 4, str(tmp_path)) == [[], [1.0], [], [0.0]]
