"""Every check finds what is well, and says of what is not how to mend it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from launch import checks
from launch.checks import (
    Check,
    command,
    devices,
    disk,
    failed,
    locked_memory,
    memory,
    of_a_machine,
    ports,
    shared_memory,
    visible,
)


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_this_machine_is_well(tmp_path: Path) -> None:
    found = of_a_machine(tmp_path, "true")
    assert failed(found) == "", "\n".join(map(str, found))
    assert {"memory", "shared memory", "disk", "exclusive", "fsync", "clock", "ports", "torch", "backend"} <= {
        one.name for one in found
    }
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_what_is_to_be_mended_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (unwritable,) = disk(tmp_path / "file")
    assert unwritable.ok is False and "Make it writable" in str(unwritable)
    assert shared_memory(str(tmp_path / "none")).ok is False
    monkeypatch.setattr(checks, "GIB", 1 << 60)
    assert memory().ok is False and shared_memory().ok is None
    full, *_ = disk(tmp_path)
    assert full.ok is False and str(full).startswith("MEND  disk") and "Make room" in str(full)


def test_a_file_system_without_exclusive_creation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: opened(path, flags & ~os.O_EXCL, *mode))
    assert next(one for one in disk(tmp_path) if one.name == "exclusive").ok is False


def test_a_name_that_leads_nowhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ports().ok
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert ports().ok is False and "/etc/hosts" in str(ports())


def test_a_limit_and_devices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    assert locked_memory().ok is None and "ulimit -l unlimited" in str(locked_memory())
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert locked_memory().ok is True
    assert devices()[0].name == "torch"
    absent = next(one for one in devices(2) if one.name == "GPUs")
    assert absent.ok is False and "0 of 2 are seen" in str(absent)


def test_machines_see_each_others_files(tmp_path: Path) -> None:
    found: dict[int, Check] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: visible(tmp_path, "x", n, 3)})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(found[n].ok for n in range(3)) and list(tmp_path.iterdir()) == []
    alone = visible(tmp_path, "y", 0, 2, seconds=0.3)
    assert alone.ok is False and "what machines [1] write" in str(alone) and "all machines share" in str(alone)


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_command_of_the_users_own() -> None:
    assert command("true").ok is True
    assert "status 3: broken" in command("echo broken; exit 3").found


def test_lines() -> None:
    assert str(Check("disk", True, "fine", "never")) == "ok    disk         fine"
    assert str(Check("disk", None, "slow", "Wait")) == "note  disk         slow. Wait"
    assert failed([Check("a", False, "x"), Check("b", None, "y"), Check("c", False, "z")]) == "a: x; c: z"
