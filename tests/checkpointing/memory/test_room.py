"""Whether arenas fit is known before any is made, and the refusal shows its arithmetic."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from checkpointing.errors import LayoutError
from checkpointing.memory import room
from checkpointing.memory.room import SPARE_BYTES, SPARE_PART_OF_TMPFS, Room, check_room, find_room


def test_the_least_of_filesystem_and_machine(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert 0 < find_room(tmp_path).nbytes <= status.f_blocks * status.f_frsize


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_all_cgroups_above_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    line = "0::/jobs/step" if version == 2 else "7:cpu,memory:/jobs/step"
    base = tmp_path if version == 2 else tmp_path / "memory"
    limit, used = "memory.max", "memory.current"
    if version == 1:
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    (base / "jobs" / "step").mkdir(parents=True)
    (base / "jobs" / limit).write_text("5000\n")
    (base / "jobs" / used).write_text("1000\n")
    (base / "jobs" / "step" / limit).write_text("max\n")
    (base / "jobs" / "step" / used).write_text("1\n")
    read, told = Path.read_text, f"9:pids:/x\n{line}\n"
    monkeypatch.setattr(Path, "read_text", lambda p, *a: told if str(p) == "/proc/self/cgroup" else read(p, *a))
    assert find_room(tmp_path, cgroups=tmp_path) == Room(3000, f"the memory limit of {base / 'jobs'}")
    prefix = "total_" if version == 1 else ""  # of this group and those below
    (base / "jobs" / "memory.stat").write_text(f"anon 7\ninactive_file 0\n{prefix}inactive_file 300\n")
    assert find_room(tmp_path, cgroups=tmp_path).nbytes == 4300 - 4300 // 4  # the page cache gives way


def test_what_is_pinned_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (77, 77))
    assert find_room(tmp_path, pinned=True) == Room(77, "the limit of locked memory (ulimit -l)")
    assert find_room(tmp_path).nbytes > 77


def test_what_stays_for_others_is_little_where_there_is_little() -> None:
    """A container's /dev/shm of 64 MB is nearly all for snapshots."""
    assert Room.within(64 * 2**20, "", SPARE_PART_OF_TMPFS).nbytes == 62 * 2**20
    assert Room.within(2**40, "", SPARE_PART_OF_TMPFS).nbytes == 2**40 - SPARE_BYTES
    assert Room.within(400 * 2**20, "").nbytes == 300 * 2**20 and Room.within(2**40, "").nbytes == 2**40 - SPARE_BYTES
    assert Room.within(-5, "").nbytes == -5


def test_the_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_room", lambda *_, **__: Room(2 * 10**9, "the machine"))
    check_room(tmp_path, 2 * 10**9, "two of 1 GB")
    with pytest.raises(
        LayoutError, match=r"need 3\.00 GB more in .* \(three of 1 GB\), and the machine leaves 2\.00 GB"
    ):
        check_room(tmp_path, 3 * 10**9, "three of 1 GB")
