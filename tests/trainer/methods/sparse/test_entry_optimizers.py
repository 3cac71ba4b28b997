"""AdamW with an age an entry against torch's; SM3 against one written densely; shards against the whole."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn

from checkpointing import Slice
from tests.harness.worlds import SharedWorld
from trainer.methods.sparse.entry_optimizers import EntryAdamW, EntrySM3, accumulators
from trainer.methods.sparse.layer import choose, make_sparse
from trainer.options.method import Granularity

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(steps: int, size: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for _ in range(steps)]


def test_with_equal_ages_it_is_adamw() -> None:
    ours, theirs = (nn.Parameter(torch.arange(6.0)) for _ in range(2))
    mine, torchs = EntryAdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for gradient in gradients(20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_entry_that_came_late_trains_as_if_it_had_begun_then() -> None:
    ours, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    mine, fresh = EntryAdamW([ours], **OPTIONS), torch.optim.AdamW([late], **OPTIONS)
    given = gradients(12, 2)
    for number, gradient in enumerate(given):
        if number == 7:
            with torch.no_grad():
                ours[1] = 1.0
            for state in mine.state[ours].values():
                state[1] = 0
        ours.grad = gradient.clone()
        mine.step()
        if number >= 7:
            late.grad = gradient[1:].clone()
            fresh.step()
    torch.testing.assert_close(ours[1:], late, rtol=1e-6, atol=1e-7)
    assert mine.state[ours]["age"].tolist() == [12, 5]


def test_state_can_be_made_before_the_first_step() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = EntryAdamW([parameter], **OPTIONS)
    assert not optimizer.state
    optimizer.prepare()
    assert {key: value.tolist() for key, value in optimizer.state[parameter].items()} == {
        key: [0, 0, 0] for key in EntryAdamW.MOMENTS
    }


def sparse_layer() -> nn.Module:
    torch.manual_seed(0)
    layer = make_sparse(nn.Linear(4, 3, bias=False), Granularity.element, 6)
    choose(layer, torch.tensor([0, 1, 5, 6, 7, 11]))
    return layer


def sm3_by_hand(steps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With the whole matrix, of which entries that do not train have no part."""
    layer = sparse_layer()
    indices = layer.sparse_indices.long()  # type: ignore[operator]
    values, rows, columns = torch.zeros(6), torch.zeros(3), torch.zeros(4)
    for gradient in steps:
        second = torch.full((3, 4), -torch.inf)
        at = torch.minimum(rows[indices // 4], columns[indices % 4]) + gradient**2
        second.view(-1)[indices] = at
        values = values - 0.01 * gradient / (at.sqrt() + 1e-8)
        rows, columns = torch.maximum(rows, second.amax(1)), torch.maximum(columns, second.amax(0))
    return values, rows, columns


def sm3_of_a_share() -> tuple[list[float], list[float], list[float]]:
    """Of this rank's entries, when two share them unevenly."""
    layer = sparse_layer()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, length = (0, 6) if size == 1 else ((0, 4), (4, 2))[rank]
    parameter = nn.Parameter(torch.zeros(length))
    optimizer = EntrySM3([parameter], lr=0.01)
    host = SimpleNamespace(
        held_of=lambda _: [Slice(layer.sparse_values, start, length, 0)],  # type: ignore[arg-type]
        layer_group=dist.group.WORLD if size > 1 else None,
    )
    optimizer.place(host, [layer])  # type: ignore[arg-type, list-item]
    for gradient in gradients(5):
        parameter.grad = gradient[start : start + length].clone()
        optimizer.step()
    rows, columns = accumulators(layer)  # type: ignore[arg-type]
    return parameter.tolist(), rows.tolist(), columns.tolist()


def test_sm3_is_the_papers_whole_and_in_shares(world: SharedWorld) -> None:
    whole = sm3_of_a_share()
    for ours, papers in zip(whole, sm3_by_hand(gradients(5)), strict=True):
        torch.testing.assert_close(torch.tensor(ours), papers, rtol=1e-6, atol=1e-8)
    first, second = world.run(sm3_of_a_share, 2)
    assert (first[0] + second[0], first[1], first[2]) == whole and first[1:] == second[1:]
