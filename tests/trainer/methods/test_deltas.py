"""Differences from a base: put in and taken out bit for bit, added up, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from trainer.errors import Refused
from trainer.methods.deltas import Applied, Delta, LowRank, compose, difference, take_out
from trainer.methods.entries import Entries


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).to(dtype)


def delta(base: nn.Module, indices: list[int], values: list[float], name: str = "0.weight") -> Delta:
    weight = dict(base.named_parameters())[name].detach()
    at = torch.tensor(indices, dtype=torch.int32)
    entries = Entries(at, torch.tensor(values), weight.view(-1)[at.long()].clone())
    return Delta({name: entries}, {}, {name: tuple(weight.shape)}, "sparse")


def state(one: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in one.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.dictionaries(st.integers(0, 11), st.floats(-3, 3, width=32), max_size=12))
def test_in_and_out_again_bit_for_bit(dtype: torch.dtype, changes: dict[int, float]) -> None:
    base = model(dtype)
    before = state(base)
    given = delta(base, sorted(changes), [changes[i] for i in sorted(changes)])
    applied = Applied(base, given)
    after = dict(base.named_parameters())["0.weight"].detach().view(-1)
    for index, value in changes.items():
        expected = (before["0.weight"].view(-1)[index].float() + torch.tensor(value)).to(dtype)
        assert after[index] == expected or value == 0
    applied.undo()
    assert same(before, state(base))


def test_adding_and_subtracting_would_not_restore_bf16() -> None:
    """The control for replacing: arithmetic does not come back."""
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(0)).bfloat16()
    change = torch.randn(4000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert not torch.equal(weight + change - change, weight)


def test_a_low_rank_pair_goes_in_and_out(tmp_path: Path) -> None:
    base = model()
    before = state(base)
    pair = LowRank(torch.randn(2, 4), torch.randn(3, 2))
    given = Delta({}, {"0.weight": pair}, {"0.weight": (3, 4)}, "spt")
    given.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d")
    applied = Applied(base, again)
    torch.testing.assert_close(dict(base.named_parameters())["0.weight"].detach(), before["0.weight"] + pair.B @ pair.A)
    applied.undo()
    assert same(before, state(base))
    twice = compose([given, again])
    torch.testing.assert_close(twice.low_rank["0.weight"].product(), 2 * pair.product())


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    given = delta(model(), [1, 5, 11], [0.5, -1.0, 2.0])
    given.save(tmp_path / "d")
    again = Delta.load(tmp_path / "d")
    assert again.shapes == given.shapes and again.method == "sparse" and again.count == 3
    for part in ("indices", "values", "originals"):
        assert torch.equal(getattr(again.entries["0.weight"], part), getattr(given.entries["0.weight"], part))


@given(
    st.dictionaries(st.integers(0, 11), st.floats(-3, 3, width=32), max_size=8),
    st.dictionaries(st.integers(0, 11), st.floats(-3, 3, width=32), max_size=8),
)
def test_several_compose_to_their_sum(first: dict[int, float], second: dict[int, float]) -> None:
    base = model()
    deltas = [delta(base, sorted(c), [c[i] for i in sorted(c)]) for c in (first, second)]
    total = compose(deltas).entries["0.weight"]
    assert total.indices.tolist() == sorted(first.keys() | second.keys())
    for index, value in zip(total.indices.tolist(), total.values.tolist(), strict=True):
        assert value == pytest.approx(first.get(index, 0) + second.get(index, 0), abs=1e-6)
    before = state(base)
    applied = Applied(base, compose(deltas))
    applied.undo()
    assert same(before, state(base))


def test_differences_of_any_two_models() -> None:
    base, tuned = model(), model()
    with torch.no_grad():
        tuned[0].weight[1, 2] += 0.25  # type: ignore[index,operator]
        tuned[1].bias[4] -= 1  # type: ignore[index,operator]
    found = difference(state(base), state(tuned), "full")
    assert {name: e.indices.tolist() for name, e in found.entries.items()} == {"0.weight": [6], "1.bias": [4]}
    Applied(base, found)
    assert same(state(base), state(tuned))


def test_another_base_is_refused_and_left_alone() -> None:
    base = model()
    given = delta(base, [1, 5], [0.5, 1.0])
    with torch.no_grad():
        base[0].weight.view(-1)[5] += 1e-3  # type: ignore[index,operator]
    before = state(base)
    with pytest.raises(Refused, match=r"0\.weight is not what the delta was trained on"):
        Applied(base, given)
    assert same(before, state(base))
    with pytest.raises(Refused, match=r"The model has no 0\.weight of the delta's shape"):
        Applied(nn.Sequential(nn.Linear(4, 4)), given)
    take_out(dict(base.named_parameters()), given)
    Applied(base, given)
    with pytest.raises(Refused, match="is not what the delta was trained on"):  # twice in a row
        Applied(base, given)


def test_deltas_that_have_no_sum_are_refused() -> None:
    base, other = model(), model()
    with torch.no_grad():
        other[0].weight.add_(1)  # type: ignore[operator]
    pair = Delta({}, {"0.weight": LowRank(torch.ones(1, 4), torch.ones(3, 1))}, {"0.weight": (3, 4)}, "spt")
    one = delta(base, [1, 2], [1.0, 1.0])
    for others, why in (
        (delta(other, [2, 3], [1.0, 1.0]), "has another base in each of the deltas"),
        (pair, "they have no common form"),
        (Delta({}, {}, {"0.weight": (4, 3)}, "x"), "has other shapes in the deltas"),
    ):
        with pytest.raises(Refused, match=why):
            compose([one, others])


def test_files_that_are_no_deltas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    given = delta(model(), [1, 5], [0.5, 1.0])
    given.save(path)
    whole = path.read_bytes()
    for broken in (b"", whole[:50], whole[:-3]):
        path.write_bytes(broken)
        with pytest.raises(Refused, match="cannot be read as a file of differences"):
            Delta.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(Refused, match=r"`python -m trainer\.methods delta` writes one"):
        Delta.load(path)
    with pytest.raises(Refused, match="cannot be read"):
        Delta.load(tmp_path / "nowhere")
    for part, tensor, why in (
        ("indices", torch.tensor([5, 1], dtype=torch.int32), "not sorted"),
        ("indices", torch.tensor([1, 12], dtype=torch.int32), "beyond its shape"),
        ("values", torch.ones(3), "other numbers of values"),
    ):
        given.save(path)
        tensors, about = load_file(path), _metadata(path)
        save_file({**tensors, f"0.weight/{part}": tensor}, path, about)
        with pytest.raises(Refused, match=why):
            Delta.load(path)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())
