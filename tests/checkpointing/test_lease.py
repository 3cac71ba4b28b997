"""One live writer a directory; a dead one is replaced, by one process only. And what is in use stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from checkpointing import LeaseHeldError, UnreadableError, lease, small_files
from checkpointing.lease import EXPIRY_S, Hold, Holder, Lease, held_generations, hold, holder_of, still_holds
from checkpointing.storage import FileStorage
from checkpointing.stores import MemoryStorage


def write_lease(directory: Path, holder: Holder, number: int = 1) -> None:
    FileStorage(directory).put(f"lease-{number:06d}.json", [json.dumps(asdict(holder)).encode()])


def test_a_second_holder_is_told_who_holds_it(tmp_path: Path) -> None:
    first = Lease.acquire(FileStorage(tmp_path))
    with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on .* holds "):
        Lease.acquire(FileStorage(tmp_path))
    first.release()
    for _ in range(40):
        Lease.acquire(FileStorage(tmp_path)).release()
    assert [path.name for path in tmp_path.iterdir()] == ["lease-000082.json"]  # the number, and that nobody has it


def test_whether_a_lease_is_held_is_seen_without_taking_it(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    assert holder_of(storage) is None
    held = Lease.acquire(storage)
    found = holder_of(storage)
    assert found is not None and found.pid == os.getpid()
    held.check()
    held.release()
    assert holder_of(storage) is None


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_killed_holder_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from checkpointing.lease import Lease; from checkpointing.storage import FileStorage\n"
        "Lease.acquire(FileStorage(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeldError, match=f"process {holder.pid}"):
        Lease.acquire(FileStorage(tmp_path))
    holder.kill()  # not yet waited for: a zombie does not hold it either
    began = time.monotonic()
    while True:
        try:
            Lease.acquire(FileStorage(tmp_path)).release()
            break
        except LeaseHeldError:
            assert time.monotonic() - began < 10
    holder.wait()


def test_a_recycled_pid_is_not_the_holder(tmp_path: Path) -> None:
    write_lease(tmp_path, replace(Holder.this_process(), started="1"))
    Lease.acquire(FileStorage(tmp_path)).release()


def test_a_holder_elsewhere_is_watched(tmp_path: Path) -> None:
    elsewhere = replace(Holder.this_process(), host="another", boot_id="other")
    write_lease(tmp_path, elsewhere)
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.05):
            count += 1
            FileStorage(tmp_path).put("lease-000001.beat", [str(count).encode()])

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LeaseHeldError, match="on another holds"):
        Lease.acquire(FileStorage(tmp_path), expiry_s=20)
    stop.set()
    thread.join()
    Lease.acquire(FileStorage(tmp_path), expiry_s=0.3).release()  # it beats no more


def test_of_several_that_replace_a_dead_one_one_wins(tmp_path: Path) -> None:
    write_lease(tmp_path, replace(Holder.this_process(), started="1"))
    barrier, won, lost = threading.Barrier(6), [], []

    def take() -> None:
        barrier.wait()
        try:
            won.append(Lease.acquire(FileStorage(tmp_path)))
        except LeaseHeldError:
            lost.append(1)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(won), len(lost)) == (1, 5)
    won[0].release()


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced by a copy"])
def test_a_directory_that_goes_away_is_said_and_is_not_made_anew(how: str, tmp_path: Path) -> None:
    """What the run still has open would be written elsewhere, and looked for here."""
    root = tmp_path / "run" / ".lease"
    held = Lease.acquire(FileStorage(root))
    (tmp_path / "run").rename(tmp_path / "moved")
    if how == "deleted":
        shutil.rmtree(tmp_path / "moved")
    elif how == "replaced by a copy":
        shutil.copytree(tmp_path / "moved", tmp_path / "run")
    with pytest.raises(LeaseHeldError, match="was moved, deleted or replaced"):
        held.check(anew=True)
    held.release()
    assert root.exists() == (how == "replaced by a copy")


@pytest.mark.parametrize("what", ["pipe", "directory", "link"])
def test_a_claim_that_is_no_file_is_one_of_a_process_that_cannot_be_told(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tmp_path / "lease-000001.json"
    if what == "pipe":
        os.mkfifo(claim)
    elif what == "directory":
        claim.mkdir()
    else:
        claim.symlink_to("/nowhere")
    waited: list[Holder | None] = []
    held = Lease.acquire(FileStorage(tmp_path), expiry_s=0.2, waiting=waited.append)
    assert held.number == 2 and waited == [None]
    held.release()


def test_names_that_are_nearly_claims_are_none(tmp_path: Path) -> None:
    for name in (
        "lease-\u00b25.json",
        "lease-1.json",
        f"lease-{'9' * 200}.json",
        "lease-000001.json.old",
        "lease-x.json",
    ):
        (tmp_path / name).write_text("{}")
    held = Lease.acquire(FileStorage(tmp_path))
    assert held.number == 1
    held.release()


def test_a_replaced_holder_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    sleeper = Lease.acquire(FileStorage(tmp_path))
    sleeper.check()
    write_lease(tmp_path, Holder.this_process(), number=2)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            sleeper.check()
        except LeaseHeldError as error:
            assert "took over" in str(error)
            break
        time.sleep(0.01)
    else:
        pytest.fail("the replaced holder never noticed")
    sleeper.release()
    assert (tmp_path / "lease-000002.json").exists()  # the new holder's is left alone


def test_a_lease_that_is_half_written_is_waited_for(tmp_path: Path) -> None:
    FileStorage(tmp_path).put("lease-000001.json", [b'{"host": "x'])
    Lease.acquire(FileStorage(tmp_path), expiry_s=0.2).release()


def test_who_creates_a_number_too_late_backs_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its creation, two others took over one after the other."""
    write_lease(tmp_path, replace(Holder.this_process(), started="1"))
    create = FileStorage.create_if_absent
    ahead: list[Lease] = []

    def slow(self: FileStorage, name: str, data: bytes) -> bool:
        monkeypatch.setattr(FileStorage, "create_if_absent", create)
        write_lease(tmp_path, Holder.this_process(), number=3)
        return create(self, name, data)

    monkeypatch.setattr(FileStorage, "create_if_absent", slow)
    with pytest.raises(LeaseHeldError):
        ahead.append(Lease.acquire(FileStorage(tmp_path)))
    assert ahead == [] and (tmp_path / "lease-000003.json").exists()


def test_giving_back_does_not_take_what_another_one_has(tmp_path: Path) -> None:
    sleeper = Lease.acquire(FileStorage(tmp_path))
    write_lease(tmp_path, replace(Holder.this_process(), started="1"), number=2)
    other = Lease.acquire(FileStorage(tmp_path))
    sleeper.check()  # it looked a moment ago
    with pytest.raises(LeaseHeldError, match="took over"):
        sleeper.check(anew=True)
    with pytest.raises(LeaseHeldError, match="took over"):
        sleeper.check()
    sleeper.release()
    other.check(anew=True)
    other.release()


def test_after_a_pause_it_is_looked_at_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, now = Lease.acquire(FileStorage(tmp_path)), lease._clock()
    monkeypatch.setattr(lease, "_clock", lambda: now + 3600)
    held.check()  # nobody else came: it goes on
    held.release()
    held = Lease.acquire(FileStorage(tmp_path))
    write_lease(tmp_path, Holder.this_process(), number=held.number + 1)
    monkeypatch.setattr(lease, "_clock", lambda: now + 7200)
    with pytest.raises(LeaseHeldError, match="took over"):
        held.check()
    held.release()


def test_a_storage_that_fails_loses_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it fails: it is lost when somebody else has it. Until that can be told nothing is written."""
    storage = FileStorage(tmp_path)
    held, now = Lease.acquire(storage), lease._clock()
    with monkeypatch.context() as patch:

        def failing(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(FileStorage, "put", failing)
        held.check()
        patch.setattr(lease, "_clock", lambda: now + 3600)
        with pytest.raises(OSError, match="Input/output error"):
            held.check()
        patch.setattr(FileStorage, "put", lambda *_: pytest.fail("it looks again, and a line of metrics waits for it"))
        with pytest.raises(OSError, match="Input/output error"):
            held.check()  # as the last look said: the heartbeat goes on looking
    held.check(anew=True)
    held.release()


def test_a_claim_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Lease.acquire(FileStorage(tmp_path))
    monkeypatch.setattr(small_files, "RETRY_S", (0.0,))

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UnreadableError):
        patch.setattr(os, "preadv", failing)
        Lease.acquire(FileStorage(tmp_path), expiry_s=0.1)
    held.check(anew=True)
    held.release()


@pytest.mark.parametrize("how", ["of another user", "hidden"])
def test_a_holder_that_cannot_be_looked_at_lives(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = replace(Holder.this_process(), pid=4_000_000 if how == "of another user" else os.getpid(), started="7")
    write_lease(tmp_path, holder)

    def forbidden(*_: object) -> None:
        raise PermissionError

    read_text = Path.read_text

    def hidden(path: Path, *arguments: Any, **named: Any) -> str:
        if path.name == "stat" and path.parts[2] != "self":
            raise FileNotFoundError(path)
        return read_text(path, *arguments, **named)

    if how == "of another user":
        monkeypatch.setattr(os, "kill", forbidden)
    else:
        monkeypatch.setattr(Path, "read_text", hidden)
    with pytest.raises(LeaseHeldError, match=f"process {holder.pid} on"):
        Lease.acquire(FileStorage(tmp_path))


def test_a_copy_is_held_by_nobody_and_what_was_moved_is(tmp_path: Path) -> None:
    held = Lease.acquire(FileStorage(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    Lease.acquire(FileStorage(tmp_path / "copy")).release()
    held.check(anew=True)
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(LeaseHeldError):
        Lease.acquire(FileStorage(tmp_path / "moved"))
    with pytest.raises(LeaseHeldError):
        held.check(anew=True)
    held.release()
    Lease.acquire(FileStorage(tmp_path / "copy")).release()


@pytest.mark.parametrize(
    "claim", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b'{"pid": -1}', json.dumps({"host": 1, "pid": "x"}).encode()]
)
def test_a_claim_that_is_none_is_watched(claim: bytes, tmp_path: Path) -> None:
    FileStorage(tmp_path).put("lease-000001.json", [claim])
    told = list[Holder | None]()
    Lease.acquire(FileStorage(tmp_path), expiry_s=0.1, waiting=told.append).release()
    assert told == [None]


def test_whoever_works_for_a_holder_sees_whether_another_one_came(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    held = Lease.acquire(storage)
    assert still_holds(storage, held.number, held.claim)
    held.release()
    assert still_holds(storage, held.number, held.claim)  # nobody has it
    other = Lease.acquire(storage)
    assert not still_holds(storage, held.number, held.claim)
    other.release()
    (tmp_path / "again").mkdir()  # where numbers began anew
    write_lease(tmp_path / "again", Holder.this_process(), held.number)
    assert not still_holds(FileStorage(tmp_path / "again"), held.number, held.claim)


def test_a_holder_in_another_container_is_watched_and_not_looked_up(tmp_path: Path) -> None:
    """The same host name and boot, and a pid that means nothing here."""
    write_lease(tmp_path, replace(Holder.this_process(), pid_namespace="pid:[1]", pid=2**22 - 1))
    began = time.monotonic()
    Lease.acquire(FileStorage(tmp_path), expiry_s=0.3).release()
    assert time.monotonic() - began >= 0.3


def test_a_hold_lasts_while_its_process_lives_or_until_it_is_released(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    with hold(storage, "step-00000001-aaaaaaaa"), Hold(storage, "step-00000002-bbbbbbbb", "write"):
        assert held_generations(storage) == {"step-00000001-aaaaaaaa", "step-00000002-bbbbbbbb"}
        assert held_generations(storage, "read") == {"step-00000001-aaaaaaaa"}
    assert held_generations(storage) == set() and list(tmp_path.iterdir()) == []


def hold_of(storage: MemoryStorage, holder: Holder, name: str = "step-00000001-aaaaaaaa") -> str:
    path = f"hold-{name}.read-{holder.token}"
    storage.put(f"{path}.json", [json.dumps(asdict(holder)).encode()])
    return path


def test_a_hold_of_a_dead_process_of_this_machine_is_forgotten_at_once() -> None:
    storage, this = MemoryStorage(), Holder.this_process()
    hold_of(storage, replace(this, started="before"))  # the pid was given to another process since
    assert held_generations(storage) == set() and storage.list() == {}


def test_a_hold_elsewhere_counts_until_its_beat_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, elsewhere = MemoryStorage(), replace(Holder.this_process(), host="another", boot_id="another")
    path = hold_of(storage, elsewhere)
    now = [100.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: now[0])
    for beat in range(5):  # it beats, however seldom one looks
        now[0] += 2 * EXPIRY_S
        storage.put(f"{path}.beat", [str(beat).encode()])
        assert held_generations(storage)
    now[0] += EXPIRY_S - 1
    assert held_generations(storage)
    now[0] += 2
    assert held_generations(storage) == set() and storage.list() == {}


def test_a_hold_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    with Hold(FileStorage(tmp_path), "step-00000001-aaaaaaaa", "read"):
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob("hold-*.beat")):
            assert time.monotonic() < deadline
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_may_only_be_read_is_read_without_a_hold(tmp_path: Path) -> None:
    class ReadOnly(FileStorage):
        def create_if_absent(self, name: str, data: bytes) -> bool:
            raise PermissionError(13, "Permission denied", name)

    with hold(ReadOnly(tmp_path), "step-00000001-aaaaaaaa"):
        assert list(tmp_path.iterdir()) == []


def test_a_beat_whose_hold_is_gone_is_cleared_away() -> None:
    storage = MemoryStorage()
    storage.put("hold-step-00000001-aaaaaaaa.read-0123.beat", [b"1"])
    assert held_generations(storage) == set() and storage.list() == {}
