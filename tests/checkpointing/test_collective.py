"""A team fails together, with one rank's reason, and never hangs."""

from __future__ import annotations

from checkpointing import DamagedError, PeerError
from checkpointing.collective import Team
from tests.threads import ThreadTeam, all_of, on_ranks


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
