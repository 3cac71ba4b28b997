"""A team fails together, with one rank's reason, and never hangs."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpointing import DamagedError, PeerError, collective
from checkpointing.collective import Team
from tests.harness.processes import wait_for
from tests.harness.threads import ThreadTeam, all_of, on_ranks
from tests.harness.worlds import SharedWorld


def test_alone_without_a_process_group() -> None:
    team = Team()
    assert (team.rank, team.size) == (0, 1)
    assert team.together(lambda: {"a": (1, 2)}) == [{"a": [1, 2]}]  # as JSON, like with others


def test_results_come_in_the_order_of_ranks() -> None:
    results = all_of(on_ranks(3, lambda team: team.together(lambda: team.rank * 10)))
    assert results == [[0, 10, 20]] * 3


def test_all_fail_with_the_lowest_failing_rank() -> None:
    def act(team: ThreadTeam) -> None:
        def fail() -> None:
            if team.rank == 1:
                raise OSError("disk full")
            if team.rank == 2:
                raise DamagedError("torn")

        team.together(fail)

    first, second, third = on_ranks(3, act)
    assert isinstance(first, PeerError) and str(first) == "rank 1: disk full"
    assert isinstance(second, OSError)
    assert isinstance(third, PeerError) and str(third) == "rank 1: disk full"
    assert isinstance(third.__cause__, DamagedError)  # its own reason is not lost


def test_our_own_errors_keep_their_type() -> None:
    def act(team: ThreadTeam) -> None:
        def fail() -> None:
            if team.rank == 0:
                raise DamagedError("torn")

        team.together(fail)

    assert [type(error) for error in on_ranks(2, act)] == [DamagedError, DamagedError]


def test_a_result_that_cannot_travel_fails_all_instead_of_leaving_them_waiting() -> None:
    failed = on_ranks(3, lambda team: team.together(lambda: {1, 2} if team.rank == 1 else [3]))
    assert [type(e).__name__ for e in failed] == ["PeerError", "TypeError", "PeerError"]


def test_the_first_hears_all_and_tells_each_its_own() -> None:
    def act(team: ThreadTeam) -> tuple[list[str], str]:
        told = team.to_first(f"of {team.rank}")
        return told, team.from_first(lambda rank: f"for {rank}, of {len(told)}")

    found = all_of(on_ranks(3, act))
    assert found == [(["of 0", "of 1", "of 2"], "for 0, of 3"), ([], "for 1, of 3"), ([], "for 2, of 3")]
    assert act(Team()) == (["of 0"], "for 0, of 1")  # type: ignore[arg-type]


def freed_elsewhere(exchange: str) -> bool:
    """Whether a tensor that collectives were given is freed by another thread than this one."""
    freed: list[int] = []  # by which threads
    seen: list[weakref.ref[torch.Tensor]] = []

    def watched(name: str) -> Any:
        call = getattr(dist, name)

        def watch(*arguments: Any, **options: Any) -> Any:
            given = [one for each in arguments for one in (each if isinstance(each, list) else [each])]
            tensors = [one for one in given if isinstance(one, torch.Tensor)]
            seen.extend(weakref.ref(one, lambda _: freed.append(threading.get_ident())) for one in tensors)
            return call(*arguments, **options)

        return watch

    team = Team()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "send", "recv"):
            patch.setattr(dist, name, watched(name))
        for _ in range(300):
            if exchange == "together":
                team.together(lambda: team.rank)
            elif exchange == "to first":
                team.to_first("text")
            elif exchange == "from first":
                team.from_first(str)
            else:  # the control: as one would write it without us
                dist.all_gather([torch.ones(3) for _ in range(team.size)], torch.ones(3))
    collective.take_back()
    collective._lent.clear()
    wait_for(lambda: len(freed) == len(seen), 30)
    assert seen
    return set(freed) != {threading.get_ident()}


@pytest.mark.smoke
@pytest.mark.parametrize("exchange", ["together", "to first", "from first"])
def test_a_thread_of_gloo_is_never_the_last_to_let_go(exchange: str, world: SharedWorld) -> None:
    """It would free a tensor while Python ends, and abort a process that had done all its work."""
    assert not any(world.run(freed_elsewhere, 3, exchange))
    assert any(world.run(freed_elsewhere, 3, "the control"))


@pytest.mark.parametrize("comes_back", [True, False])
def test_before_python_ends_what_was_lent_is_taken_back(comes_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "_lent", [])
    monkeypatch.setattr(collective, "TAKE_BACK_S", 30.0 if comes_back else 0.1)
    tensor = torch.ones(3, requires_grad=True)
    held = [tensor * tensor]  # autograd keeps the factors, out of Python's sight
    collective._lend(tensor)
    del tensor
    collective._lend(torch.ones(1))
    assert len(collective._lent) == 2
    collective._lend(torch.ones(2))
    assert len(collective._lent) == 2  # what is back is let go, and what is still out is not
    thread = threading.Timer(0.2, held.clear)
    if comes_back:
        thread.start()
    began = time.monotonic()
    collective.take_back()
    assert bool(held) is not comes_back and time.monotonic() - began < 20
    thread.cancel()
    held.clear()
    collective._lend(torch.ones(2))
    assert len(collective._lent) == 1
