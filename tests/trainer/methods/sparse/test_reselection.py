"""What a re-selection may not change: the count, the survivors' values and moments; what is new starts at zero."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.methods.entries import Entries
from trainer.methods.sparse.reselection import Candidates, number_to_replace, regrow, renew

SIZE = 40


def entries(indices: list[int]) -> Entries:
    found = torch.tensor(sorted(indices), dtype=torch.int32)
    return Entries(found, found.float() / 7 + 1, found.float() * 10)


@given(st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=20), st.data())
def test_regrow_drops_some_and_grows_as_many_from_zero(active: set[int], data: st.DataObject) -> None:
    before = entries(list(active))
    positions = data.draw(st.sets(st.integers(0, len(active) - 1)))
    others = sorted(set(range(SIZE)) - active)
    grown = data.draw(st.permutations(others))[: len(positions)]
    positions = set(sorted(positions)[: len(grown)])
    moments = {"exp_avg": before.values * 3, "age": before.values * 0 + 9}
    seeds = {"exp_avg": torch.arange(len(grown)).float() + 100}
    found = regrow(before, moments, torch.tensor(sorted(positions), dtype=torch.int64), torch.tensor(grown), seeds)
    indices = found.entries.indices.tolist()
    assert indices == sorted(set(indices)) and len(indices) == len(active)
    dropped = {before.indices.tolist()[p] for p in positions}
    assert set(indices) == (active - dropped) | set(grown)
    for at, index in enumerate(indices):
        if index in active:
            was = before.indices.tolist().index(index)
            assert (
                found.entries.values[at] == before.values[was]
                and found.moments["exp_avg"][at] == moments["exp_avg"][was]
            )
            assert found.entries.originals[at] == before.originals[was] and found.moments["age"][at] == 9
        else:
            assert found.entries.values[at] == 0 and at in found.fresh.tolist() and found.moments["age"][at] == 0
            assert found.moments["exp_avg"][at] == 100 + grown.index(index)
    assert found.settled.indices.numel() == 0


@given(st.sets(st.integers(0, SIZE - 1), max_size=12), st.sets(st.integers(0, SIZE - 1), max_size=12), st.data())
def test_renew_loses_nothing_that_was_learned(active: set[int], left: set[int], data: st.DataObject) -> None:
    before, settled = entries(list(active)), entries(list(left - active))
    chosen = sorted(data.draw(st.sets(st.integers(0, SIZE - 1), min_size=len(active), max_size=len(active))))
    found = renew(before, {"age": before.values * 2}, settled, torch.tensor(chosen, dtype=torch.int64))
    assert found.entries.indices.tolist() == chosen
    everything = {**learned(settled), **learned(before)}
    after = {**learned(found.settled), **learned(found.entries)}
    assert {i: v for i, v in after.items() if i in everything} == everything
    assert all(after[i] == (0, 0) for i in after.keys() - everything.keys())
    assert not set(found.settled.indices.tolist()) & set(chosen)
    assert found.settled.indices.tolist() == sorted(found.settled.indices.tolist())
    fresh = {found.entries.indices.tolist()[p] for p in found.fresh.tolist()}
    assert fresh == set(chosen) - everything.keys()
    for at, index in enumerate(chosen):
        was = before.values[before.indices.tolist().index(index)] * 2 if index in active else 0
        assert found.moments["age"][at] == was


def learned(entries: Entries) -> dict[int, tuple[float, float]]:
    return {
        i: (v, o)
        for i, v, o in zip(entries.indices.tolist(), entries.values.tolist(), entries.originals.tolist(), strict=True)
    }


def test_the_first_replaces_all_and_the_share_falls_to_nothing() -> None:
    assert number_to_replace(0.2, 1000, 20, 200, first=True) == 1000
    assert number_to_replace(0.2, 1000, 40, 200, first=False) == 160
    assert number_to_replace(0.2, 1000, 200, 200, first=False) == 0


def test_candidates_have_the_moments_that_adam_would_have() -> None:
    candidates, parameter = Candidates.of(torch.tensor([3, 5])), torch.nn.Parameter(torch.zeros(2))
    adam = torch.optim.AdamW([parameter], betas=(0.9, 0.95))
    for gradient in (torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])):
        candidates.add(gradient, 0.5, (0.9, 0.95))
        parameter.grad = gradient * 0.5
        adam.step()
    torch.testing.assert_close(candidates.exp_avg, adam.state[parameter]["exp_avg"])
    torch.testing.assert_close(candidates.exp_avg_sq, adam.state[parameter]["exp_avg_sq"])
    assert candidates.sums.tolist() == [1.5, 2.0]  # not clipped: what grows is decided by the whole gradient
