"""Exactly so many, ties to the lower index, and the same on any number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.harness.worlds import SharedWorld
from trainer.methods.selection.choosing import Ranks, best, choose_above, choose_each, choose_together

CPU = torch.device("cpu")
SCORES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, -1.0, float("nan"), float("inf")]), min_size=1, max_size=30)


@given(SCORES, st.integers(0, 35))
def test_the_best_are_those_of_a_stable_sort(scores: list[float], count: int) -> None:
    order = sorted(range(len(scores)), key=lambda i: (-(scores[i] if scores[i] == scores[i] else -float("inf")), i))
    assert best(torch.tensor(scores), count).indices.tolist() == sorted(order[:count])


def test_what_is_near_the_last_one_is_counted() -> None:
    scores = torch.tensor([5.0, 1.0, 1.0 + 5e-7, 1.0 - 5e-7, 0.9])
    assert best(scores.double(), 2).near == 2 and best(scores.double(), 1).near == 0


def weights(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 9, (n,), generator=generator).float() for n in (7, 1, 12, 30, 5)]


def choices(count: int) -> list[list[list[int]]]:
    """By all three ways, on the ranks that there are."""
    ranks = Ranks.of(dist.group.WORLD if dist.is_initialized() else None, CPU)
    given = weights(3)

    def scorer(number: int, mine: bool) -> torch.Tensor | None:
        return given[number] if mine else None

    each, near = choose_each(scorer, [2, 1, 3, 4, 5], ranks)
    together, close = choose_together(scorer, len(given), count, ranks)
    above, _ = choose_above(scorer, len(given), 4.5, ranks)
    assert near >= 0 and close >= 0
    return [[indices.tolist() for indices in found] for found in (each, together, above)]


@settings(max_examples=20)
@given(st.integers(0, 60))
def test_the_best_of_all_weights_are_those_of_one_long_vector(count: int) -> None:
    given = weights(3)
    chosen = best(torch.cat(given), count).indices.tolist()
    _, together, above = choices(count)
    starts = [0, 7, 8, 20, 50]
    assert [start + i for start, found in zip(starts, together, strict=True) for i in found] == chosen
    assert above == [(weight > 4.5).nonzero()[:, 0].tolist() for weight in given]


def test_several_ranks_choose_what_one_does(world: SharedWorld) -> None:
    alone = choices(11)
    for size in (2, 3):
        assert world.run(choices, size, 11) == [alone] * size


def near_ones(far: int) -> tuple[list[list[int]], int]:
    """Of scores that only rank 1's weight has near the last one chosen, which is rank 0's."""
    ranks = Ranks.of(dist.group.WORLD if dist.is_initialized() else None, CPU)
    scores = [torch.tensor([3.0, 1.0]), 1.0 - 5e-7 * torch.ones(far).double(), torch.tensor([0.5])]
    chosen, near = choose_together(lambda number, mine: scores[number] if mine else None, 3, 2, ranks)
    return [indices.tolist() for indices in chosen], near


def test_all_that_are_near_the_last_of_all_weights_are_counted(world: SharedWorld) -> None:
    for size, far in ((1, 40), (2, 40), (3, 40), (2, 2000)):
        found = [near_ones(far)] if size == 1 else world.run(near_ones, size, far)
        assert found == [([[0, 1], [], []], min(far, 1024))] * size


def what_travels(count: int) -> int:
    """The longest tensor that a rank of several sends or hears."""
    ranks = Ranks.of(dist.group.WORLD, CPU)
    longest = [0]

    def noting(name: str) -> None:
        before = getattr(dist, name)

        def call(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
            longest[0] = max(longest[0], tensor.numel())
            return before(tensor, *arguments, **options)

        setattr(dist, name, call)

    names = ("send", "recv", "broadcast")
    kept = {name: getattr(dist, name) for name in names}
    try:
        for name in names:
            noting(name)
        generator = torch.Generator().manual_seed(1)
        given = [torch.rand(500, generator=generator) for _ in range(8)]
        choose_together(lambda number, mine: given[number] if mine else None, 8, count, ranks)
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
    return longest[0]


def test_no_more_candidates_travel_than_are_chosen(world: SharedWorld) -> None:
    assert max(world.run(what_travels, 4, 50)) == 50


def united() -> dict[str, list[int]]:
    ranks = Ranks.of(dist.group.WORLD, CPU)
    here = {"a": torch.tensor([1, 2])} if ranks.rank == 0 else {"b": torch.tensor([7])}
    return {name: found.tolist() for name, found in ranks.union(here, ["a", "b", "c"]).items()}


def test_what_ranks_have_of_different_layers_is_told_to_all(world: SharedWorld) -> None:
    assert world.run(united, 2) == [{"a": [1, 2], "b": [7]}] * 2
