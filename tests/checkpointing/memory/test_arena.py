"""A rank's memory in an arena: there before it is used, of the right size, and seen by other processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpointing.format import shard_name
from checkpointing.memory.arena import ARENA, MappedShard, arena_name


def test_it_is_allocated_and_shared(tmp_path: Path) -> None:
    shard = MappedShard(tmp_path / arena_name(3), 7, 10_000)
    path = tmp_path / "arena-3" / shard_name(7)
    status = path.stat()
    assert (status.st_size, status.st_mode & 0o777) == (10_000, 0o600)
    assert status.st_blocks * 512 >= 10_000  # not sparse: writing it cannot run out of room
    shard.bytes[5:8] = b"abc"
    shard.tensor[9] = 200
    assert path.read_bytes()[5:10] == b"abc\0\xc8"
    shard.close()


def test_what_is_there_is_used_again_and_another_size_is_made_anew(tmp_path: Path) -> None:
    first = MappedShard(tmp_path / "arena-0", 0, 5000)
    first.bytes[:3] = b"old"
    again = MappedShard(tmp_path / "arena-0", 0, 5000)
    assert bytes(again.bytes[:3]) == b"old" and again.identity == first.identity
    other = MappedShard(tmp_path / "arena-0", 0, 6000)
    assert bytes(other.bytes[:3]) == bytes(3) and other.nbytes == 6000


def test_it_stays_mapped_through_a_rename(tmp_path: Path) -> None:
    shard = MappedShard(tmp_path / "arena-0", 0, 5000)
    (tmp_path / "arena-0").rename(tmp_path / "step-00000001-00000000")
    shard.bytes[:3] = b"new"
    assert (tmp_path / "step-00000001-00000000" / shard_name(0)).read_bytes()[:3] == b"new"


def test_without_room_it_says_so_and_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        os.write(descriptor, b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        MappedShard(tmp_path / "arena-0", 0, 5000)
    assert (tmp_path / "arena-0" / shard_name(0)).stat().st_size == 0


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "arena-0").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "arena-0" / shard_name(0)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        MappedShard(tmp_path / "arena-0", 0, 5000)
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


def test_names() -> None:
    assert ARENA.fullmatch(arena_name(12)) and not ARENA.fullmatch("arena-x") and not ARENA.fullmatch("step-1")
