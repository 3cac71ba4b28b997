"""The five operations: what every storage does, and what only files can suffer."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing import DamagedError, NotFoundError, UnreadableError, small_files
from checkpointing import storage as storage_module
from checkpointing.lease import Hold
from checkpointing.small_files import replace_file
from checkpointing.storage import SMALL_BYTES, FileStorage, Storage
from checkpointing.stores import MemoryStorage


@pytest.fixture(params=["files", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return FileStorage(tmp_path / "deep" / "er") if request.param == "files" else MemoryStorage()


def test_what_is_put_is_listed_and_read(storage: Storage) -> None:
    storage.put("a/x", [b"hello", memoryview(b" world")])
    storage.put("a/y", [])
    storage.put("b", [b"!"])
    assert storage.list() == {"a/x": 11, "a/y": 0, "b": 1}
    assert storage.list("a/") == {"a/x": 11, "a/y": 0}
    assert storage.list("a/x") == {"a/x": 11}
    assert storage.list("nothing/") == {}
    assert storage.read_ranges("a/x", [(0, 5), (6, 11), (3, 3)]) == [b"hello", b"world", b""]


def test_put_replaces(storage: Storage) -> None:
    storage.put("x", [b"longer"])
    storage.put("x", [b"short"])
    assert storage.list() == {"x": 5}


def test_reading_past_the_end_or_nothing_is_named(storage: Storage) -> None:
    storage.put("x", [b"12345"])
    with pytest.raises(DamagedError, match="ends at byte 5; bytes up to 9 were expected"):
        storage.read_ranges("x", [(2, 9)])
    with pytest.raises(NotFoundError, match=r"absent does not exist"):
        storage.read_ranges("absent", [(0, 1)])
    with pytest.raises(NotFoundError):
        storage.read_ranges("x/under-a-file", [(0, 1)])


def test_only_one_creator_wins(storage: Storage) -> None:
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


def test_deleting_ignores_what_is_absent(storage: Storage) -> None:
    storage.put("a/x", [b"1"])
    storage.put("a/y", [b"2"])
    storage.delete(["a/x", "a/absent", "nowhere/z"])
    assert storage.list() == {"a/y": 1}
    storage.delete(["a/y"])
    assert storage.list() == {}


def test_deleting_takes_empty_directories_along(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.put("a/x", [b"1"])
    storage.delete(["a/x"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd"])
def test_names_cannot_lead_out(storage: Storage, tmp_path: Path, name: str) -> None:
    for act in (
        lambda: storage.put(name, [b""]),
        lambda: storage.read_ranges(name, [(0, 1)]),
        lambda: storage.create_if_absent(name, b""),
        lambda: storage.delete([name]),
    ):
        with pytest.raises(DamagedError, match="leaves the directory"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["listed", "opened", "read"])
def failing(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(request.param, tmp_path, monkeypatch)


class Failing:
    """A disk on which one kind of call fails some times, with one error."""

    CALLS: ClassVar = {"listed": "scandir", "opened": "open", "read": "preadv"}

    def __init__(self, kind: str, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(small_files, "RETRY_S", (0.0, 0.0))
        self.kind, self.storage, self.left, self.calls, self.error = kind, FileStorage(top), 0, 0, errno.EIO
        self.storage.put("a/x", [b"12345"])
        real = getattr(os, self.CALLS[kind])

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.left:
                self.left -= 1
                raise OSError(self.error, os.strerror(self.error))
            return real(*arguments, **named)

        monkeypatch.setattr(os, self.CALLS[kind], call)

    def use(self) -> object:
        """What the storage says of its one object."""
        if self.kind == "listed":
            return self.storage.list()
        return bytes(self.storage.read_ranges("a/x", [(0, 5)])[0])


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EREMOTEIO])
def test_a_disk_that_fails_for_a_moment_is_asked_again(failing: Failing, error: int) -> None:
    expected = failing.use()
    failing.left, failing.error = 2, error
    assert failing.use() == expected and failing.left == 0


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_a_disk_that_goes_on_failing_says_nothing_of_what_lies_there(failing: Failing, error: int) -> None:
    """Neither damaged, nor absent, nor an empty directory: a run would start over, or fall back."""
    failing.left, failing.error = 100, error
    with pytest.raises(UnreadableError, match=os.strerror(error)) as raised:
        failing.use()
    assert not isinstance(raised.value, DamagedError | NotFoundError) and failing.left == 97


def test_what_is_forbidden_is_not_asked_for_again(failing: Failing) -> None:
    failing.calls, failing.left, failing.error = 0, 100, errno.EACCES
    with pytest.raises(UnreadableError, match="Permission denied"):
        failing.use()
    assert failing.calls == 1


def test_a_listing_enters_no_directory_that_its_prefix_excludes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, entered, scandir = FileStorage(tmp_path), list[str](), os.scandir
    names = ["a/x", "a/deep/y", "ab/x", "abc", "b/x"]
    for name in names:
        storage.put(name, [b"1"])

    def watched(path: Path) -> Any:
        entered.append(Path(path).relative_to(tmp_path).as_posix())
        return scandir(path)

    monkeypatch.setattr(os, "scandir", watched)
    for prefix, directories in {
        "": [".", "a", "a/deep", "ab", "b"],
        "a": [".", "a", "a/deep", "ab"],
        "ab": [".", "ab"],
        "abc": ["."],
        "a/": ["a", "a/deep"],
        "a/deep/": ["a/deep"],
        "none/x": ["none"],
    }.items():
        entered.clear()
        assert list(storage.list(prefix)) == sorted(name for name in names if name.startswith(prefix))
        assert sorted(entered) == sorted(directories)


def test_an_object_that_is_created_appears_with_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            FileStorage(tmp_path).create_if_absent("COMMIT", b"digest")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_without_hard_links_creation_is_still_exclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_links(source: object, target: object) -> None:
        raise OSError(number, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    storage = FileStorage(tmp_path)
    assert storage.create_if_absent("lock", b"first") and not storage.create_if_absent("lock", b"second")
    assert storage.list() == {"lock": 5}


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError  # what a retransmitted request is told

    monkeypatch.setattr(os, "link", twice)
    assert FileStorage(tmp_path).create_if_absent("lock", b"mine")


@given(st.lists(st.integers(0, 60), max_size=40))
def test_chunks_of_any_sizes_are_written_in_order(sizes: list[int]) -> None:
    chunks = [bytes([n % 256]) * size for n, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage_module, "SMALL_BYTES", 40)
        joined = [bytes(c) for c in storage_module._joined(chunks)]
    assert b"".join(joined) == b"".join(chunks)
    assert all(len(c) <= 60 for c in joined) and (not sizes or len(joined) <= len(sizes))


def test_a_write_that_fails_stops_the_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def chunks() -> Iterator[bytes]:
        for number in range(100):
            made.append(number)
            yield bytes(SMALL_BYTES)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        FileStorage(tmp_path).put("x", chunks())
    assert len(made) < 10  # and nothing more is prepared


def test_large_objects_are_written_in_order_and_synced_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fdatasync = os.fdatasync

    def syncing(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", syncing)
    monkeypatch.setattr(storage_module, "SYNC_BYTES", 4 * SMALL_BYTES)
    chunks = [os.urandom(SMALL_BYTES) for _ in range(40)]
    FileStorage(tmp_path).put("x", chunks)
    assert (tmp_path / "x").read_bytes() == b"".join(chunks)
    assert synced and min(synced) < 40 * SMALL_BYTES


def test_a_disk_that_cannot_take_it_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    monkeypatch.setattr(storage_module, "SYNC_BYTES", 1)
    with pytest.raises(OSError, match="Input/output error"):
        FileStorage(tmp_path).put("x", [bytes(SMALL_BYTES)] * 5)


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_sync_that_fails_once_fails_the_put(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells once that it lost what was written; every later sync of that file succeeds."""
    count = iter(range(1000))
    done = threading.Event()

    def fdatasync(descriptor: int) -> None:
        number = next(count)
        if number == fails:
            raise OSError(errno.EIO, "Input/output error")
        if number > fails:
            done.set()

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield bytes(SMALL_BYTES)
            done.wait(0.01)  # the next sync begins when this one is done

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(storage_module, "SYNC_BYTES", SMALL_BYTES)
    with pytest.raises(OSError, match="Input/output error"):
        FileStorage(tmp_path).put("x", chunks())


def test_what_is_no_file_is_not_there(tmp_path: Path) -> None:
    """A pipe that would never end, and a link that leads elsewhere."""
    (tmp_path / "elsewhere").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    storage = FileStorage(root)
    assert storage.list() == {}
    with pytest.raises(DamagedError):
        storage.read_ranges("link", [(0, 6)])


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "lease-000001.beat").symlink_to(tmp_path / "precious")
    storage = FileStorage(tmp_path / "root")
    with pytest.raises(OSError, match="symbolic links"):
        storage.put("lease-000001.beat", [b"1"])
    replace_file(tmp_path / "root" / "lease-000001.beat", b"1")  # the link is replaced, and not what it leads to
    assert (tmp_path / "precious").read_text() == "precious"


def test_holds_come_and_go_beside_each_other(tmp_path: Path) -> None:
    """Nobody takes away what another is about to create in."""
    failures = []

    def hold_and_let_go() -> None:
        try:
            for _ in range(30):
                Hold(FileStorage(tmp_path), "step-00000001-aaaaaaaa", "read").release()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=hold_and_let_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == [] and list(tmp_path.iterdir()) == []


def test_half_of_an_object_without_hard_links_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would pass for a commit, or for a claim."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    real, calls = small_files.write_all, []

    def full(descriptor: int, chunk: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, chunk)

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(small_files, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        FileStorage(tmp_path).create_if_absent("step/COMMIT", b"digest")
    assert len(calls) == 2 and list((tmp_path / "step").iterdir()) == []
