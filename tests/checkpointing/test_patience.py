"""A rank is waited for as long as it gets on, and given up, by name, when it says or moves nothing."""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpointing import patience
from checkpointing.collective import Team
from checkpointing.errors import LostError
from checkpointing.patience import PATIENCE, Moved, Wait, working
from tests.harness.worlds import SharedWorld


class FakeStore:
    """What ranks have said, without a process group."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self.said

    def get(self, key: str) -> bytes:
        return self.said[key].encode()


def slowly(long: bool, silence_s: float, still_s: float, takes_s: float) -> str:
    """What becomes of an exchange in which rank 1 takes its time, and moves no byte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patience, "silence_s", lambda: silence_s)
        patch.setattr(patience, "LOOK_S", 0.05)
        patch.setattr(PATIENCE, "seconds", still_s)
        team = Team()
        dist.barrier()
        try:
            told = team.together(lambda: time.sleep(takes_s) if team.rank == 1 else None, long=long)
        except LostError as error:
            return str(error)
        finally:
            dist.barrier()
        return f"{len(told)} were there"


def test_a_rank_that_says_it_works_is_waited_for_beyond_any_timeout(world: SharedWorld) -> None:
    assert world.run(slowly, 2, True, 0.4, 60.0, 1.5) == ["2 were there"] * 2


def test_one_that_says_nothing_is_given_up(world: SharedWorld) -> None:
    """The same wait, if it was not said that it takes long."""
    first, _ = world.run(slowly, 2, False, 0.4, 60.0, 1.5)
    assert first == "rank 0 cannot reach the others: rank 0 has heard nothing of the others for 0 s"


def test_one_that_lives_and_moves_nothing_is_given_up_by_name(world: SharedWorld) -> None:
    first, _ = world.run(slowly, 2, True, 0.4, 0.6, 2.0)
    assert first.startswith("rank 0 cannot reach the others: rank 1 moved nothing for") and "storage hangs" in first


def test_progress_is_bytes_or_computing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Moved()
    progress.now()
    with monkeypatch.context() as patch:
        moved, computed = patience._bytes_moved(), time.process_time()
        patch.setattr(patience, "_bytes_moved", lambda: moved)
        patch.setattr(time, "process_time", lambda: computed)
        before = progress.now()
        assert progress.now() == before  # nothing happened
        patch.setattr(time, "process_time", lambda: computed + 2 * patience.WORKED_S)
        assert progress.now() == before + 1
    before = progress.now()
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    assert patience._bytes_moved() >= moved + 10_000 and progress.now() == before + 1


def test_who_is_waited_for_is_said_once_and_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, clock = FakeStore(), [100.0]
    monkeypatch.setattr(patience, "_store", lambda: store)
    monkeypatch.setattr(patience, "silence_s", lambda: 600.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    waits = [Wait(rank, 3) for rank in (0, 1)]
    for _ in range(30):
        clock[0] += 5
        store.said[f"{patience.KEY}/2"] = f"7 {clock[0]}"
        for wait in waits:
            wait.look()
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "waiting for rank 2, whose storage has moved nothing for 65 s"
    ]
    clock[0] += 700  # it says no more
    with pytest.raises(LostError, match=r"rank 1 has heard nothing of rank 2 for 600 s"):
        waits[1].look()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({2: "7 silent"}, r"rank 0 has heard nothing of rank 2 for 600 s"),
        ({2: "7 {now}"}, r"rank 2 moved nothing for 3\d\d\d s: its storage hangs"),
        ({2: "{now} {now}"}, None),
    ],
)
def test_one_that_gets_on_does_not_speak_for_another(
    words: dict[int, str], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock = FakeStore(), [100.0]
    monkeypatch.setattr(patience, "_store", lambda: store)
    monkeypatch.setattr(patience, "silence_s", lambda: 600.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    wait, given_up = Wait(0, 3), None
    for _ in range(800):
        clock[0] += 5
        store.said = {f"{patience.KEY}/{rank}": word.format(now=clock[0]) for rank, word in words.items()}
        store.said[f"{patience.KEY}/1"] = f"{clock[0]} {clock[0]}"
        try:
            wait.look()
        except LostError as error:
            given_up = str(error)
            break
    assert given_up is None if why is None else re.fullmatch(why, given_up or "")


def test_work_that_ends_while_it_is_looked_at_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key stays, without a word: whoever asks for one that is gone waits for it."""
    store = FakeStore()
    monkeypatch.setattr(patience, "_store", lambda: store)
    monkeypatch.setattr(patience, "silence_s", lambda: 600.0)
    store.said[f"{patience.KEY}/1"] = ""
    assert patience._working(2) == {}
    Wait(0, 2).look()
    store.said = {f"{patience.KEY}/{rank}": "1 1.0" for rank in range(2)}
    monkeypatch.setattr(patience, "WARN_S", -1.0)
    Wait(0, 2).look()  # where all say that they work


def test_a_store_that_is_gone_is_a_world_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(patience, "_store", gone)
    with pytest.raises(LostError, match="rank 0 cannot reach the others: Connection reset"):
        Wait(0, 2).look()


def test_alone_nothing_is_said() -> None:
    before = threading.active_count()
    with working():
        assert threading.active_count() == before


def says_once() -> list[int]:
    """How many threads there are within work, within work inside of it, and after both."""
    counts = [threading.active_count()]
    with working():
        counts.append(threading.active_count())
        with working():
            counts.append(threading.active_count())
    return [*counts, threading.active_count()]


def test_work_inside_of_work_says_it_once(world: SharedWorld) -> None:
    for before, once, twice, after in world.run(says_once, 2):
        assert once == before + 1 == twice and after == before
