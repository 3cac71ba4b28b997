"""The run's directory in memory: private, locked, cleared away, and who may still write into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpointing import CheckpointError
from checkpointing.memory.directory import (
    FINISHED,
    LOCK,
    clear_forgotten,
    has_living_starts,
    join_start,
    keeper_lock,
    make_directory,
    read_secret,
    remove,
    why_not_private,
    write_keep_s,
)


def test_it_is_this_users_alone(tmp_path: Path) -> None:
    root = tmp_path / "a" / "run"
    secret = make_directory(root)
    assert len(secret) == 32 and make_directory(root) == read_secret(root) == secret  # the first one stays
    assert [p.stat().st_mode & 0o777 for p in (root.parent, root, root / "keeper.secret")] == [0o700, 0o700, 0o600]
    os.chmod(root, 0o755)
    with pytest.raises(CheckpointError, match="not this user's alone"):
        make_directory(root)


def test_nobody_else_can_put_another_one_in_its_place(tmp_path: Path) -> None:
    parent, root = tmp_path / "parent", tmp_path / "parent" / "run"
    make_directory(root)
    os.chmod(parent, 0o777)
    with pytest.raises(CheckpointError, match=r"others may write into .*parent"):
        make_directory(root)
    os.chmod(parent, 0o1777)  # as /dev/shm
    assert not why_not_private(root)
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(CheckpointError, match="link is not a directory"):
        make_directory(tmp_path / "link")


def test_one_keeper_at_a_time(tmp_path: Path) -> None:
    with keeper_lock(tmp_path) as first, keeper_lock(tmp_path) as second:
        assert first is not None and second is None
    with keeper_lock(tmp_path) as again:
        assert again is not None


def test_removing_leaves_nothing_and_may_be_done_twice(tmp_path: Path) -> None:
    root = tmp_path / "user" / "run"
    make_directory(root)
    remove(root)
    remove(root)
    assert not root.parent.exists()


def test_what_was_forgotten_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    """Each is kept for as long as its own run said."""
    for name, keep_s in {"old": 60, "long": 1e12, "kept": 60, "new": 60, "over": 1e12, "mine": 60, "bad": 0}.items():
        (tmp_path / name / "arena-0").mkdir(parents=True)
        write_keep_s(tmp_path / name, keep_s)
    (tmp_path / "no run").mkdir()
    (tmp_path / "over" / FINISHED).touch()
    (tmp_path / "bad" / LOCK).write_text("nonsense")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    (tmp_path / ".gone-5" / "arena-0").mkdir(parents=True)  # its keeper was killed while it deleted it
    for name in ("old", "long", "kept", "mine", "bad", "no run"):
        for path in (tmp_path / name).rglob("*"):
            os.utime(path, (1, 1))
    with keeper_lock(tmp_path / "kept") as lock:
        assert lock is not None
        assert sorted(clear_forgotten(tmp_path, "mine")) == ["old", "over"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "kept", "link", "long", "mine", "new", "no run"]


def test_a_start_lives_as_long_as_one_of_its_ranks(tmp_path: Path) -> None:
    assert not has_living_starts(tmp_path, "second")
    ranks = [join_start(tmp_path, "first") for _ in range(2)]
    own = join_start(tmp_path, "second")
    for rank in ranks:
        assert has_living_starts(tmp_path, "second")
        rank.close()
    assert not has_living_starts(tmp_path, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["start-second"]
    own.close()
