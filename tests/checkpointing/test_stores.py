"""A place is a path or one in a store; a store of somebody's own is a file, which nothing but its user names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointing import LayoutError, NotFoundError, UnreadableError, find, load, open_storage, save
from checkpointing import stores as module
from checkpointing.format import COMMIT
from checkpointing.storage import FileStorage
from checkpointing.stores import MemoryStorage, file_of, is_path, load_store, same_place, shared_place
from tests.checkpointing.memory.test_snapshotter import assert_equal, rows_of

STORE = """
from checkpointing.stores import MemoryStorage
kept = {}
def STORE(rest):
    return kept.setdefault(rest, MemoryStorage(rest))
"""


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORES", dict(module.STORES))
    monkeypatch.setattr(module, "_files", {})


def test_a_place_opens_the_storage_whose_place_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (tmp_path / "a", f"{tmp_path}/a", f"file://{tmp_path}/a", "~/a", "memory://a", "odd:name", "a b"):
        storage = open_storage(place)
        assert same_place(open_storage(str(storage)), storage), place
    assert same_place(open_storage("~/a"), FileStorage(tmp_path / "a"))
    assert open_storage(storage := MemoryStorage()) is storage
    assert open_storage("memory://a") is not open_storage("memory://b")
    assert is_path("runs/a:b") and is_path("s3:/x") and not is_path("s3://x")


def test_an_unknown_store_is_refused_by_name() -> None:
    with pytest.raises(NotFoundError, match=r"s3://bucket: no store is called 's3'\. Known are file, memory;"):
        open_storage("s3://bucket")


def test_saving_loading_and_finding_take_a_place(tmp_path: Path) -> None:
    for place in (f"file://{tmp_path}/x", "memory://y"):
        name = save(place, 3, rows_of(0, 1, 3), {"a": 1})
        again = rows_of(0, 1, 0)
        assert load(place, again) == {"a": 1}
        assert_equal(again, rows_of(0, 1, 3))
        found = find(place)
        assert [g.name for g in found.candidates] == [name] and found.newest is not None
        assert f"{name}/{COMMIT}" in found.storage.list()
    with pytest.raises(NotFoundError, match="memory://nothing holds no generation"):
        find("memory://nothing")


def test_a_file_of_somebodys_own_is_a_store(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(STORE)
    assert load_store(file) == "mine" and file_of("mine://a") == file and file_of("memory://a") is None
    save("mine://a", 1, rows_of(0, 1, 1))
    assert [g.step for g in find("mine://a").candidates] == [1]
    assert load_store(file) == "mine"  # twice in a row
    for name in ("file", "memory"):
        (tmp_path / f"{name}.py").write_text(STORE)
        with pytest.raises(LayoutError, match=rf"is called {name} already\. Rename"):
            load_store(tmp_path / f"{name}.py")


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        ("a.py", "x = 1", "has no STORE"),
        ("a.py", "1 +", "cannot be imported"),
        ("A.py", STORE, "is a word in lower case"),
        ("a.txt", STORE, "is no Python file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, name: str, code: str, why: str) -> None:
    (tmp_path / name).write_text(code)
    with pytest.raises(LayoutError, match=why):
        load_store(tmp_path / name)
    with pytest.raises(NotFoundError):
        open_storage("a://x")


def test_other_processes_open_what_they_can_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shared_place(FileStorage("a")) == str(tmp_path / "a")
    assert shared_place(MemoryStorage("a")) is shared_place(MemoryStorage()) is None


@pytest.mark.usefixtures("processes")
def test_opening_one_needs_no_torch() -> None:
    code = "import sys; from checkpointing.stores import open_storage; open_storage('x'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_file_that_was_mended_is_loaded_anew(tmp_path: Path) -> None:
    """A keeper outlives the trainer, and the mistakes of its first start."""
    file = tmp_path / "mine.py"
    file.write_text("def STORE(rest):\n    raise KeyError('SCRATCH')\n")
    load_store(file)
    with pytest.raises(LayoutError, match="mine://a cannot be opened: KeyError: 'SCRATCH'"):
        open_storage("mine://a")
    file.write_text(STORE)
    load_store(file)
    save("mine://a", 1, rows_of(0, 1, 1))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "mine.py").write_text(STORE)
    load_store(tmp_path / "moved" / "mine.py")
    with pytest.raises(NotFoundError, match="holds no generation"):
        find("mine://a")  # another module, which keeps objects of its own


class Broken:
    """A store whose errors are its library's own."""

    def __str__(self) -> str:
        return "broken://x"

    def put(self, name: str, chunks: object) -> None:
        list(chunks)  # type: ignore[call-overload]
        raise ValueError("a test")

    def read_ranges(self, *_: object) -> list[bytearray]:
        raise ValueError("a test")

    delete = read_ranges

    def list(self, prefix: str = "") -> dict[str, int]:
        raise ValueError("a test")

    def create_if_absent(self, name: str, data: bytes) -> bool:
        raise ValueError("a test")


def test_errors_of_a_stores_library_are_those_of_a_storage_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.STORES, "broken", lambda rest: Broken())
    storage = open_storage("broken://x")
    for read in (lambda: storage.list(), lambda: storage.read_ranges("a", [(0, 1)])):
        with pytest.raises(UnreadableError, match="ValueError: a test"):
            read()
    for write in (
        lambda: storage.put("a", [b"1"]),
        lambda: storage.create_if_absent("a", b""),
        lambda: storage.delete(["a"]),
    ):
        with pytest.raises(OSError, match="ValueError: a test"):
            write()
    with pytest.raises(OSError, match="a test"):
        save("broken://x", 1, rows_of(0, 1, 1))

    def given_up() -> Iterator[bytes]:
        yield b"1"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # of whoever writes, and not of the store
        storage.put("a", given_up())


def test_one_generation_of_a_store_can_be_named(tmp_path: Path) -> None:
    names = {place: save(place, 1, rows_of(0, 1, 1)) for place in (f"file://{tmp_path}/run/checkpoints", "memory://z")}
    for place, name in names.items():
        found = find(f"{place}/{name}")
        assert found.named == name and [g.name for g in found.candidates] == [name]
    assert find(f"file://{tmp_path}/run").newest is not None  # a run's directory, as without file://
    assert find(open_storage("memory://z")).newest is not None
    with pytest.raises(NotFoundError, match="holds no generation step-00000009-aaaaaaaa"):
        find("memory://z/step-00000009-aaaaaaaa")


def test_only_ones_own_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(open_storage("~/x")) == f"{tmp_path}/x" and str(open_storage("~nobody/x")) == "~nobody/x"
    assert not is_path("S3://bucket") and is_path("a/b://c")
