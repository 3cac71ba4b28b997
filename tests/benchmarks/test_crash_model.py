"""The disk of a crash campaign: what is durable when, and what may be lost before."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.crash_model import Disk, History, Operation, Write, crash_states, torn

EMPTY = Disk({0: {}}, {})
Listing = dict[str, bytes]


def in_order(*operations: Operation) -> list[Operation]:
    """One after the other; those that come with times keep them."""
    timed = []
    for number, op in enumerate(operations):
        began, ended = (op.began, op.ended) if op.ended else (10 * number + 1, 10 * number + 2)
        timed.append(Operation(op.kind, op.path, op.other, op.data, op.at, op.truncate, op.rank, began, ended))
    return timed


def states(operations: Iterable[Operation], start: Disk = EMPTY, samples: int = 40) -> dict[str, list[Listing]]:
    """What a crash at the end may leave, by how it came about."""
    history = History(start, operations)
    found: dict[str, list[Listing]] = {}
    for how, disk in crash_states(history, len(history.operations), samples, random.Random(0)):
        found.setdefault(how.partition(" ")[0] if how.startswith("sample") else how, []).append(disk.listing())
    return found


def lost(operations: Iterable[Operation], start: Disk = EMPTY) -> Listing:
    """Only what is durable."""
    found = states(operations, start, 0)
    return found.get("all un-synced is lost", found["all is kept, as after a kill"])[0]


CREATED = [Operation("open", "a"), Operation("write", "a", data=b"xyz", at=0)]


def test_content_needs_its_file_synced_and_a_name_its_directory() -> None:
    sync, sync_directory = Operation("sync", "a"), Operation("sync", "")
    assert lost(in_order(*CREATED)) == {}
    assert lost(in_order(*CREATED, sync)) == {}
    assert lost(in_order(*CREATED, sync_directory)) == {"a": b""}
    assert lost(in_order(*CREATED, sync, sync_directory)) == {"a": b"xyz"}
    assert lost(in_order(sync_directory, *CREATED, sync)) == {}
    more = Operation("write", "a", data=b"!!", at=3)
    assert lost(in_order(*CREATED, sync, sync_directory, more)) == {"a": b"xyz"}


def test_all_is_kept_after_a_kill_and_kinds_are_lost_apart() -> None:
    found = states(in_order(*CREATED))
    assert found["all is kept, as after a kill"] == [{"a": b"xyz"}]
    assert found["un-synced contents are lost"] == [{"a": b""}]
    assert found["un-synced names are lost"] == [{}]
    assert found["un-synced contents are zeros"] == [{"a": bytes(3)}]
    assert {tuple(listing.items()) for listing in found["sample"]} >= {(), (("a", b""),), (("a", b"xyz"),)}


def test_a_sync_covers_only_what_had_ended_and_counts_from_its_own_end() -> None:
    opened = Operation("open", "a", began=1, ended=2)
    named = Operation("sync", "", began=3, ended=4)
    write = Operation("write", "a", data=b"xyz", at=0, began=5, ended=8)
    meanwhile = Operation("sync", "a", began=7, ended=20)
    assert lost([opened, named, write, meanwhile]) == {"a": b""}
    behind = Operation("sync", "a", began=8, ended=20)
    assert lost([opened, named, write, behind]) == {"a": b"xyz"}
    other = Operation("mkdir", "d", began=9, ended=10)  # while the sync runs
    history = History(EMPTY, [opened, named, write, behind, other])
    assert [op.kind for op in history.operations] == ["open", "sync", "write", "mkdir", "sync"]
    before_its_end = [disk.listing() for _, disk in crash_states(history, 4, 0, random.Random(0))]
    assert {"a": b""} in before_its_end


def test_a_rename_without_a_sync_of_the_content_leaves_an_empty_file() -> None:
    """What the well-known mistake leaves behind, and what it does not if it is not made."""
    start = Disk({0: {"state": 1}}, {1: b"old"})
    draft = [Operation("open", "draft"), Operation("write", "draft", data=b"new", at=0)]
    rename = Operation("rename", "draft", "state")
    careless = states(in_order(*draft, rename, Operation("sync", "")), start)
    assert {listing["state"] for found in careless.values() for listing in found} >= {b"", b"new"}
    careful = states(in_order(*draft, Operation("sync", "draft"), rename), start)
    assert {listing["state"] for found in careful.values() for listing in found} == {b"old", b"new"}


def test_a_rename_is_durable_only_where_both_directories_are() -> None:
    start = Disk({0: {"a": 1, "b": 2}, 1: {"f": 3}, 2: {}}, {3: b"x"})
    rename = Operation("rename", "a/f", "b/f")
    assert lost(in_order(rename, Operation("sync", "b")), start) == {"a/": b"", "b/": b"", "a/f": b"x"}
    both = in_order(rename, Operation("sync", "b"), Operation("sync", "a"))
    assert lost(both, start) == {"a/": b"", "b/": b"", "b/f": b"x"}


def test_a_lost_directory_takes_with_it_what_was_synced_in_it() -> None:
    made = [Operation("mkdir", "d"), Operation("open", "d/a"), Operation("write", "d/a", data=b"x", at=0)]
    synced = [Operation("sync", "d/a"), Operation("sync", "d")]
    assert lost(in_order(*made, *synced)) == {}
    assert lost(in_order(*made, *synced, Operation("sync", ""))) == {"d/": b"", "d/a": b"x"}


def test_a_link_is_the_same_file_and_deletions_can_be_lost() -> None:
    linked = [*CREATED, Operation("sync", "a"), Operation("link", "a", "b"), Operation("sync", "")]
    unlinked = in_order(*linked, Operation("unlink", "a"))
    assert lost(unlinked) == {"a": b"xyz", "b": b"xyz"}
    assert states(unlinked)["all is kept, as after a kill"] == [{"b": b"xyz"}]
    # A descriptor may write to a file under the name that it had.
    written = in_order(*linked, Operation("unlink", "a"), Operation("write", "a", data=b"!", at=3))
    assert states(written)["all is kept, as after a kill"] == [{"b": b"xyz!"}]


def test_truncation_appending_and_new_sizes() -> None:
    start = Disk({0: {"a": 1}}, {1: b"abc"})
    append = Operation("write", "a", data=b"de", at=None)
    steps = in_order(append, Operation("resize", "a", at=8), Operation("resize", "a", at=4))
    assert History(start, steps).end.listing() == {"a": b"abcd"}
    emptied = in_order(Operation("open", "a", truncate=True))
    assert states(emptied, start)["all is kept, as after a kill"] == [{"a": b""}]
    assert lost(emptied, start) == {"a": b"abc"}
    assert History(start, in_order(Operation("open", "a"))).end.listing() == {"a": b"abc"}


def test_a_write_is_torn_at_sectors_of_the_file() -> None:
    data = bytes(range(1, 251)) * 40  # no zeros
    write = Write(1, 100, data)
    start = Disk({0: {"a": 1}}, {1: b"#" * 100})
    rng = random.Random(0)
    kinds = set()
    for _ in range(300):
        content = start.after(torn(write, rng)).listing()["a"]
        assert content[:100] == b"#" * 100 and len(content) <= 100 + len(data)
        whole = b"#" * 100 + data
        parts = [(content[at : at + 512], whole[at : at + 512]) for at in range(0, len(content), 512)][1:]
        assert all(found in (written, bytes(len(written))) for found, written in parts if len(found) == len(written))
        kinds.add((len(content) == len(whole), bytes(512) in content, content[-5:] == whole[-5:]))
    assert {(True, True, True), (True, True, False), (False, False, False), (True, False, True)} <= kinds


def test_what_was_never_made_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="the recording is not whole or not in order: d is used"):
        History(EMPTY, in_order(Operation("open", "d/a")))


def test_a_directory_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "d" / "empty").mkdir(parents=True)
    (tmp_path / "d" / "a").write_bytes(b"x")
    assert Disk.at(tmp_path).listing() == {"d/": b"", "d/empty/": b"", "d/a": b"x"}
