"""The plan is used again exactly as long as no rank's layout changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from checkpointing import MismatchError, Piece, load, planner, save
from checkpointing.collective import Team
from checkpointing.plan import layout_rows, plan_save
from checkpointing.planner import agree_on_plan
from checkpointing.stores import MemoryStorage
from tests.harness.threads import all_of, on_ranks

Layout = Callable[[int], list[Piece]]


def halves(rank: int) -> list[Piece]:
    return [Piece("w", torch.zeros(2, 3), (2 * rank, 0), (4, 3)), Piece("s", torch.tensor(1.0), (), ())]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing remembered; how many plans were made since."""
    made: list[int] = []

    def counting(layouts: list, nodes: list) -> object:
        made.append(len(layouts))
        return plan_save(layouts, nodes)

    monkeypatch.setattr(planner, "plan_save", counting)
    planner.forget()
    return made


def plans(layout: Layout, size: int = 2) -> list:
    return all_of(on_ranks(size, lambda team: agree_on_plan(team, layout_rows(layout(team.rank)))))


def test_the_same_layouts_are_planned_once(forgotten: list[int]) -> None:
    first = plans(halves)
    assert forgotten == [2]  # by rank 0
    again = plans(halves)
    assert forgotten == [2] and all(a is b for a, b in zip(first, again, strict=True))


CHANGES: dict[str, Layout] = {
    "a shape": lambda r: [Piece("w", torch.zeros(3, 3), (3 * r, 0), (6, 3)), *halves(r)[1:]],
    "a dtype": lambda r: [Piece("w", torch.zeros(2, 3).half(), (2 * r, 0), (4, 3)), *halves(r)[1:]],
    "the boxes": lambda r: [Piece("w", torch.zeros(3 - 2 * r, 3), (3 * r, 0), (4, 3)), *halves(r)[1:]],
    "a name": lambda r: [Piece("v", torch.zeros(2, 3), (2 * r, 0), (4, 3)), *halves(r)[1:]],
    "which rank": lambda r: halves(1 - r),
    "a tensor on one rank": lambda r: halves(r)[: 2 - r],
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_drops_the_plan(forgotten: list[int], change: str) -> None:
    plans(halves)
    forgotten.clear()
    found = plans(CHANGES[change])
    assert forgotten, change
    layouts = [layout_rows(CHANGES[change](rank)) for rank in range(2)]
    fresh = plan_save(layouts)
    assert found == [fresh.of(0, layouts[0]), fresh.of(1, layouts[1])]


def test_another_number_of_ranks_drops_the_plan(forgotten: list[int]) -> None:
    def replicated(rank: int) -> list[Piece]:
        return [Piece("w", torch.zeros(2), (0,), (2,))]

    for size in (2, 3, 1):
        assert sum(len(plan.boxes) for plan in plans(replicated, size)) == 1
    assert forgotten == [2, 3, 1]


def test_a_rank_that_has_forgotten_makes_all_exchange(forgotten: list[int]) -> None:
    plans(halves)
    del planner._plans.remembered[next(iter(planner._plans.remembered))]
    forgotten.clear()
    plans(halves)
    assert forgotten == [2]


def test_plans_are_remembered_in_turn_and_not_without_end(forgotten: list[int]) -> None:
    def numbered(number: int) -> list[Piece]:
        return [Piece(f"w{number}", torch.zeros(1), (0,), (1,))]

    for _ in range(2):
        for number in range(planner.REMEMBERED):
            agree_on_plan(Team(), layout_rows(numbered(number)))
    assert len(forgotten) == planner.REMEMBERED
    agree_on_plan(Team(), layout_rows(numbered(99)))
    assert len(planner._plans.remembered) == planner.REMEMBERED


def test_completeness_is_agreed_once_for_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, checked = MemoryStorage(), []
    check = planner.check_nothing_left
    monkeypatch.setattr(planner, "check_nothing_left", lambda *args: checked.append(1) or check(*args))
    for step in (1, 2):
        save(storage, step, halves_of_one())
    for step in (1, 1, 2, 2, 1):
        load(storage, halves_of_one(), step=step)
    assert len(checked) == 2
    with pytest.raises(MismatchError, match="nothing asks for"):
        load(storage, halves_of_one()[:1], step=1)
    assert len(checked) == 3


def halves_of_one() -> list[Piece]:
    return [piece for rank in range(2) for piece in halves(rank)][:3]


def test_a_remembered_plan_saves_what_the_pieces_hold_now() -> None:
    storage = MemoryStorage()
    for value in (1.0, 2.0):
        save(storage, int(value), [Piece("w", torch.full((3,), value), (0,), (3,))])
    target = Piece("w", torch.zeros(3), (0,), (3,))
    load(storage, [target])
    assert target.tensor.tolist() == [2.0] * 3
