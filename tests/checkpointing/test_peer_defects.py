"""What other checkpoint libraries get wrong (`python -m benchmarks.peer_defects` shows it), each tried here."""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointing import DamagedError, Piece, describe, load, param_groups, restore_param_groups, save
from checkpointing.format import digest
from tests.harness.processes import ROOT
from tests.harness.threads import all_of, on_ranks


class Net(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.trained = nn.Linear(6, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), value))
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


def optimizer_of(net: Net, options: list[dict]) -> torch.optim.Optimizer:
    groups = zip(([net.trained.weight], [net.trained.bias]), options, strict=True)
    return torch.optim.AdamW([{"params": params, **chosen} for params, chosen in groups])


def rows_of(pieces: list[Piece], rank: int, size: int) -> list[Piece]:
    """This rank's share of each piece's rows; scalars on every rank."""
    shares = []
    for piece in pieces:
        if piece.tensor.dim() == 0:
            shares.append(piece)
            continue
        rows = piece.global_shape[0]
        start, stop = rank * rows // size, (rank + 1) * rows // size
        offset = (start, *(0 for _ in piece.global_shape[1:]))
        shares.append(Piece(piece.name, piece.tensor[start:stop], offset, piece.global_shape))
    return shares


def test_options_of_every_param_group_are_restored(tmp_path: Path) -> None:
    options = [{"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)}, {"lr": 0.01, "weight_decay": 0.0}]
    net = Net(1.0)
    optimizer = optimizer_of(net, options)
    pieces = describe(net, optimizer)
    saved = {"groups": param_groups(net, optimizer)}
    all_of(on_ranks(2, lambda t: save(tmp_path, 1, rows_of(pieces, t.rank, 2), saved, t)))
    other = Net(2.0)
    fresh = optimizer_of(other, [{"lr": 9.0}, {"lr": 9.0}])
    restore_param_groups(load(tmp_path, describe(other, fresh))["groups"], other, fresh)
    for before, after in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in before.items() if k != "params"} == {k: v for k, v in after.items() if k != "params"}
    assert fresh.param_groups[0]["lr"] != fresh.param_groups[1]["lr"]


def test_frozen_parameters_and_buffers_are_restored(tmp_path: Path) -> None:
    pieces = describe(Net(1.0))
    all_of(on_ranks(3, lambda t: save(tmp_path, 1, rows_of(pieces, t.rank, 3), group=t)))
    net = Net(2.0)
    load(tmp_path, describe(net))
    assert all(bool((tensor == 1.0).all()) for tensor in net.state_dict().values())
    assert not net.frozen.weight.requires_grad


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """How many bytes each read call asks for."""
    asked: list[int] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: list, position: int) -> int:
        asked.append(sum(map(len, buffers)))
        return preadv(descriptor, buffers, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        yield asked


SIDE = 1024  # of two matrices of 4 MiB


def shard(rank: int, size: int, dim: int, values: torch.Tensor | None = None) -> list[Piece]:
    start, stop = rank * SIDE // size, (rank + 1) * SIDE // size
    box = (slice(start, stop), slice(None)) if dim == 0 else (slice(None), slice(start, stop))
    local = torch.zeros(SIDE, SIDE)[box].contiguous() if values is None else values[box].contiguous()
    return [Piece("w", local, (start, 0) if dim == 0 else (0, start), (SIDE, SIDE))]


@pytest.mark.parametrize("saved", [0, 1])
@pytest.mark.parametrize("size", range(2, 9))
def test_a_change_of_the_shard_axis_reads_what_it_needs(tmp_path: Path, size: int, saved: int) -> None:
    values = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(size))
    all_of(on_ranks(size, lambda t: save(tmp_path, 1, shard(t.rank, size, saved, values), group=t)))
    targets = [shard(rank, size, 1 - saved) for rank in range(size)]
    with counted_reads() as asked:
        all_of(on_ranks(size, lambda t: load(tmp_path, targets[t.rank], group=t)))
    for (target,), (expected,) in zip(targets, (shard(r, size, 1 - saved, values) for r in range(size)), strict=True):
        assert torch.equal(target.tensor, expected.tensor)
    # At this size manifest, indexes and headers, which every rank reads, still count.
    described = sum(path.stat().st_size for path in tmp_path.glob("*/*.json")) + size * 16 * 1024
    factor = (sum(asked) - size * described) / values.nbytes
    assert factor <= (1.05 if size in (2, 4, 8) else 1.4)
    assert sum(asked) >= values.nbytes  # the control: the count sees what is read


def test_nothing_that_is_read_is_executed(tmp_path: Path) -> None:
    """A manifest that is a pickle with a call in it, and has its right digest."""
    marker = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(marker),)

    directory = tmp_path / save(tmp_path, 1, [Piece("w", torch.ones(2), (0,), (2,))])
    trap = pickle.dumps(Trap())
    for name in ("manifest.json", "index-00000.json", "shard-00000.safetensors", "COMMIT"):
        original = (directory / name).read_bytes()
        (directory / name).write_bytes(trap)
        if name == "manifest.json":
            (directory / "COMMIT").write_text(digest(trap))
        with pytest.raises(DamagedError):
            load(tmp_path, [Piece("w", torch.zeros(2), (0,), (2,))], step=1)
        (directory / name).write_bytes(original)
    assert not marker.exists()
    pickle.loads(trap)  # noqa: S301  # the control: the trap works
    assert marker.exists()


def test_no_module_of_the_library_can_execute_what_it_reads() -> None:
    forbidden = {"eval", "exec", "compile", "__import__"}
    for path in (ROOT / "checkpointing").rglob("*.py"):
        # A reader that runs nothing of them: its own test has traps.
        reads = {"pickle"} if path.parts[-2:] == ("foreign", "archive.py") else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names} - reads
                assert not names & {"pickle", "marshal", "shelve", "dill"}
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in {"pickle", "marshal", "shelve", "dill"}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path


def test_a_flipped_bit_never_loads(tmp_path: Path) -> None:
    directory = tmp_path / save(tmp_path, 1, [Piece("w", torch.ones(30_000), (0,), (30_000,))])
    path = directory / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[70_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="checksum of bytes"):
        load(tmp_path, [Piece("w", torch.zeros(30_000), (0,), (30_000,))], step=1)


@pytest.mark.parametrize("same_step", [True, False])
def test_a_save_cut_off_midway_is_not_mixed_with_the_one_before(tmp_path: Path, same_step: bool) -> None:
    """All files of the second save are written, and then the commit fails."""

    def layout(value: float, rank: int) -> list[Piece]:
        return [Piece("w", torch.full((4, 5), value), (4 * rank, 0), (8, 5))]

    all_of(on_ranks(2, lambda t: save(tmp_path, 1, layout(1.0, t.rank), group=t)))

    def dies() -> None:
        raise OSError("the node is gone")

    found = on_ranks(2, lambda t: save(tmp_path, 1 if same_step else 2, layout(2.0, t.rank), group=t, guard=dies))
    assert all(isinstance(result, Exception) for result in found)
    targets = [layout(0.0, rank) for rank in range(2)]
    all_of(on_ranks(2, lambda t: load(tmp_path, targets[t.rank], group=t)))
    assert [target[0].tensor.unique().tolist() for target in targets] == [[1.0], [1.0]]
