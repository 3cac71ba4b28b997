"""Ranks as threads: `save` and `load` themselves, run on many ranks without a process group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from checkpointing.collective import Team

T = TypeVar("T")
WAIT_S = 60


class ThreadTeam(Team):
    """One of several ranks that gather through shared memory."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.group, self.alone = None, False
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def _exchanging(self) -> None:
        return None

    def _to_first(self, text: str) -> list[str]:
        gathered = self._gather(text)
        return gathered if self.rank == 0 else []

    def _from_first(self, text_of: Callable[[int], str]) -> str:
        told = self._gather("\0".join(text_of(rank) for rank in range(self.size)) if self.rank == 0 else "")
        return told[0].split("\0")[self.rank]

    def _gather(self, text: str) -> list[str]:
        self._board[self.rank] = text
        self._barrier.wait(WAIT_S)
        gathered = list(self._board)
        self._barrier.wait(WAIT_S)
        return gathered


def on_ranks(size: int, action: Callable[[ThreadTeam], T]) -> list[T | Exception]:
    """Run `action(team)` on every rank at once; each rank's result, or what it raised."""
    barrier, board = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = action(ThreadTeam(rank, size, barrier, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a rank hangs"
    return results


def all_of(results: list[T | Exception]) -> list[T]:
    """The results, if no rank raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]
