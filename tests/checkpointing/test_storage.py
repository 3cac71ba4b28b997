"""The filesystem behind the five operations."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from checkpointing import DamagedError, NotFoundError
from checkpointing.storage import FileStorage


def test_what_is_put_is_listed_and_read(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "deep" / "er")
    storage.put("a/x", [b"hello", memoryview(b" world")])
    storage.put("a/y", [])
    storage.put("b", [b"!"])
    assert storage.list() == {"a/x": 11, "a/y": 0, "b": 1}
    assert storage.list("a/") == {"a/x": 11, "a/y": 0}
    assert storage.list("a/x") == {"a/x": 11}
    assert storage.list("nothing/") == {}
    assert storage.read_ranges("a/x", [(0, 5), (6, 11), (3, 3)]) == [b"hello", b"world", b""]


def test_put_replaces(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.put("x", [b"longer"])
    storage.put("x", [b"short"])
    assert storage.list() == {"x": 5}


def test_reading_past_the_end_or_nothing_is_named(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.put("x", [b"12345"])
    with pytest.raises(DamagedError, match="ends at byte 5; bytes up to 9 were expected"):
        storage.read_ranges("x", [(2, 9)])
    with pytest.raises(NotFoundError, match="absent does not exist"):
        storage.read_ranges("absent", [(0, 1)])
    with pytest.raises(NotFoundError):
        storage.read_ranges("x/under-a-file", [(0, 1)])


def test_only_one_creator_wins(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    results: list[tuple[bool, int]] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        results.append((storage.create_if_absent("d/lock", str(number).encode()), number))

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    winners = [number for won, number in results if won]
    assert len(winners) == 1
    assert storage.read_ranges("d/lock", [(0, 1)]) == [str(winners[0]).encode()]


def test_deleting_takes_empty_directories_along(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.put("a/x", [b"1"])
    storage.put("a/y", [b"2"])
    storage.delete(["a/x", "a/absent", "nowhere/z"])
    assert storage.list() == {"a/y": 1}
    storage.delete(["a/y"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd"])
def test_names_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    storage = FileStorage(tmp_path / "inside")
    for act in (
        lambda: storage.put(name, [b""]),
        lambda: storage.read_ranges(name, [(0, 1)]),
        lambda: storage.create_if_absent(name, b""),
        lambda: storage.delete([name]),
    ):
        with pytest.raises(DamagedError, match="leaves the directory"):
            act()
    assert list(tmp_path.iterdir()) == []
