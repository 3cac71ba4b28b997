"""Reading by mapping gives what reading gives, and never touches what is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpointing.errors import DamagedError, NotFoundError
from checkpointing.memory.mapped import MappedStorage
from checkpointing.storage import FileStorage


def test_the_same_bytes_as_from_a_file(tmp_path: Path) -> None:
    data = os.urandom(20_000)
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "f").write_bytes(data)
    ranges = [(0, 10), (4096, 20_000), (5, 5), (0, 20_000)]
    mapped, read = (S(tmp_path).read_ranges("g/f", ranges) for S in (MappedStorage, FileStorage))
    assert [bytes(a) for a in mapped] == [bytes(b) for b in read] == [data[a:b] for a, b in ranges]


def test_what_a_reader_changes_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (view,) = MappedStorage(tmp_path).read_ranges("f", [(0, 3)])
    view[0:1] = b"x"
    assert (tmp_path / "f").read_bytes() == b"abc"


def test_a_file_that_was_written_again_is_seen(tmp_path: Path) -> None:
    storage = MappedStorage(tmp_path)
    for text in (b"one", b"three", b"seven", b""):
        (tmp_path / "f").write_bytes(text)
        assert bytes(storage.read_ranges("f", [(0, len(text))])[0]) == text
    (tmp_path / "other").write_bytes(b"eleven")
    (tmp_path / "other").rename(tmp_path / "f")
    assert bytes(storage.read_ranges("f", [(0, 6)])[0]) == b"eleven"


def test_what_is_not_there(tmp_path: Path) -> None:
    storage = MappedStorage(tmp_path)
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedError, match="ends at byte 3; bytes up to 4 were expected"):
        storage.read_ranges("f", [(0, 2), (1, 4)])
    with pytest.raises(NotFoundError):
        storage.read_ranges("g", [(0, 1)])
    for name in ("d", "link", "pipe"):
        with pytest.raises(DamagedError):
            storage.read_ranges(name, [(0, 1)])
    with pytest.raises(DamagedError):
        storage.read_ranges("../f", [(0, 1)])
