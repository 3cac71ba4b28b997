"""The run's directory in memory: private, locked, cleared away, and who may still write into it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpointing import CheckpointError
from checkpointing.memory import directory
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


def test_removing_leaves_nothing_and_may_be_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent, is_ours in ((tmp_path / "ours", True), (tmp_path / "chosen", False)):
        if is_ours:
            monkeypatch.setattr(directory, "DEFAULT_MEMORY", parent)
        for name in ("run", "other"):
            make_directory(parent / name)
        remove(parent / "run")
        remove(parent / "run")
        assert [path.name for path in parent.iterdir()] == ["other"]
        remove(parent / "other")
        assert parent.exists() != is_ours  # what somebody made for it stays


@pytest.mark.parametrize("mark", ["none", "empty", "a link"])
def test_what_has_no_mark_of_ours_is_neither_taken_nor_deleted(mark: str, tmp_path: Path) -> None:
    """As the directory of all runs, or somebody's home, that a broken name leads to."""
    root = tmp_path / "home"
    (root / "precious").mkdir(parents=True, mode=0o700)
    os.chmod(root, 0o700)
    if mark == "empty":
        (root / "keeper.secret").touch()
    elif mark == "a link":
        (tmp_path / "secret").write_text("0" * 32)
        (root / "keeper.secret").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="holds precious, and was not made for snapshots"):
        make_directory(root)
    remove(root)
    assert (root / "precious").is_dir()


def test_a_deletion_that_is_cut_short_is_ended_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_directory(tmp_path / "all" / "run")
    for name in ("arena-0", "arena-1"):
        (tmp_path / "all" / "run" / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        remove(tmp_path / "all" / "run")
    (left,) = (tmp_path / "all").iterdir()
    assert left.name.startswith(".gone-") and (left / "arena-1").is_dir()
    clear_forgotten(tmp_path / "all")
    assert not list((tmp_path / "all").iterdir())


@pytest.mark.parametrize("call", ["rename", "unlink", "rmdir"])
def test_a_deletion_that_fails_once_is_tried_again(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "DELETE_AGAIN_S", (0.0,))
    make_directory(tmp_path / "run")
    (tmp_path / "run" / "keeper.log").write_text("said")
    real, failed = getattr(os, call), []

    def once(*arguments: Any, **more: Any) -> Any:
        if not failed:
            failed.append(1)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(*arguments, **more)

    monkeypatch.setattr(os, call, once)
    remove(tmp_path / "run")
    assert failed and list(tmp_path.iterdir()) == []


def test_what_was_forgotten_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    """Each is kept for as long as its own run said."""
    for name, keep_s in {"old": 60, "long": 1e12, "kept": 60, "new": 60, "over": 1e12, "mine": 60, "bad": 0}.items():
        make_directory(tmp_path / name)
        (tmp_path / name / "arena-0").mkdir()
        write_keep_s(tmp_path / name, keep_s)
    (tmp_path / "no run").mkdir()
    (tmp_path / "over" / FINISHED).touch()
    (tmp_path / "bad" / LOCK).write_text("nonsense")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    make_directory(tmp_path / ".gone-5")  # its keeper was killed while it deleted it
    (tmp_path / ".gone-5" / "arena-0").mkdir()
    strangers = [tmp_path / ".gone-6" / "arena-0", tmp_path / "stranger" / "precious"]  # with no mark of ours
    for stranger in strangers:
        stranger.mkdir(parents=True)
        write_keep_s(stranger.parent, 0)
        os.utime(stranger.parent / LOCK, (1, 1))
    for name in ("old", "long", "kept", "mine", "bad", "no run"):
        for path in (tmp_path / name).rglob("*"):
            os.utime(path, (1, 1))
    with keeper_lock(tmp_path / "kept") as lock:
        assert lock is not None
        assert sorted(clear_forgotten(tmp_path, "mine")) == ["old", "over"]
    left = ["bad", "kept", "link", "long", "mine", "new", "no run"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*left, ".gone-6", "stranger"])
    assert all(stranger.is_dir() for stranger in strangers)


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
