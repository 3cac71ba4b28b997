"""The keeper: whom it listens to, what it commits, what it adopts, and that it is nobody's child."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from checkpointing import DamagedError, Piece
from checkpointing.format import COMMIT, shard_name
from checkpointing.generations import candidates, scan
from checkpointing.lease import Hold
from checkpointing.memory import Snapshotter, copying, keeper
from checkpointing.memory.directory import keeper_lock, make_directory, read_secret
from checkpointing.memory.image import copy_part
from checkpointing.memory.keeper import main
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import VERSION, Lines, connect, encode
from tests.checkpointing.memory.keepers import WAIT_S, answers, keeping
from tests.checkpointing.memory.test_snapshotter import assert_equal, loaded, rows_of
from tests.harness.processes import wait_for
from tests.harness.threads import ThreadTeam, all_of, on_ranks


def hello(root: Path, **changes: object) -> dict[str, object]:
    return {
        "kind": "hello",
        "version": VERSION,
        "secret": read_secret(root),
        "session": "s",
        "incarnation": 1,
        "run_id": "",
        "rank": 0,
        "ranks": [0, 1],
        "nodes": [0, 1],
        "arenas": 2,
        "keep_s": 60,
        "durable": None,
        "store": None,
        "rate": 0,
        "everywhere": 0,
        "lease": None,
    } | changes


class Rank:
    """One end of a conversation, by hand."""

    def __init__(self, root: Path, **changes: object) -> None:
        self.socket, self.lines, self.heard = connect(root), Lines(), list[dict[str, object]]()
        self.socket.settimeout(WAIT_S)
        self.say(hello(root, **changes))

    def say(self, message: dict[str, object]) -> None:
        self.socket.sendall(encode(message))

    def hear(self) -> dict[str, object] | None:
        """The next message; None where the keeper hung up."""
        while not self.heard:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self.heard += self.lines.feed(data)
        return self.heard.pop(0)


@pytest.mark.parametrize(
    "first",
    [{"secret": "0" * 32}, {"version": VERSION + 1}, {"kind": "begin"}, {"ranks": None}, {"arenas": "x"}],
    ids=["secret", "version", "no hello", "no ranks", "another type"],
)
def test_whoever_does_not_know_the_secret_is_hung_up_on(tmp_path: Path, first: dict[str, object]) -> None:
    with keeping(tmp_path):
        good = Rank(tmp_path)
        assert good.hear() == {"kind": "welcome", "version": VERSION, "pid": os.getpid()}
        stranger = Rank(tmp_path, **first)
        assert stranger.hear() is None
        good.say({"kind": "begin", "serial": 1, "everywhere": 0})  # and goes on with the others
        assert (good.hear() or {})["kind"] == "skipped"  # as rank 1 is not there


@pytest.mark.parametrize(
    "data", [b"\n", b"GET / HTTP/1.1\r\n\r\n", b'{"kind":"nonsense"}\n', b'{"kind":"begin"}\n', b"\0" * 99 + b"\n"]
)
def test_nonsense_ends_one_connection_and_no_more(tmp_path: Path, data: bytes) -> None:
    with keeping(tmp_path):
        good, bad = Rank(tmp_path, ranks=[0]), Rank(tmp_path, rank=1, ranks=[0])
        assert good.hear() and bad.hear()
        bad.socket.sendall(data)
        assert bad.hear() is None
        good.say({"kind": "begin", "serial": 1, "everywhere": 0})
        assert (good.hear() or {})["kind"] == "go"


def test_a_generation_is_committed_when_every_rank_has_finished(tmp_path: Path) -> None:
    with keeping(tmp_path):
        ranks = [Rank(tmp_path, rank=rank) for rank in (0, 1)]
        arenas = []
        for rank in ranks:
            assert (rank.hear() or {})["kind"] == "welcome"
        for rank in ranks:
            rank.say({"kind": "begin", "serial": 1, "everywhere": 0})
            arenas.append((rank.hear() or {})["arena"])
        assert arenas[0] == arenas[1]
        head = {"step": 5, "save_id": "a" * 32, "serial": 1}
        prepared = {"kind": "prepared", "serial": 1, "arena": arenas[0], "writer": None}
        ranks[0].say({"kind": "layout", "layout": "l", "text": '{"tensors":{}}'})
        ranks[0].say(prepared | {"manifest": head, "layout": "l", "durable": False})
        ranks[0].say({"kind": "begin", "serial": 1, "everywhere": 0})
        assert (ranks[0].hear() or {})["kind"] == "go"  # it has heard all of that, and waits for the other
        assert not list(tmp_path.glob(f"step-*/{COMMIT}"))
        ranks[1].say(prepared)
        assert (ranks[1].hear() or {})["kind"] == "committed"
        assert [p.parent.name for p in tmp_path.glob(f"step-*/{COMMIT}")] == ["step-00000005-aaaaaaaa"]


def test_ranks_of_a_node_get_a_snapshot_together_or_not_at_all(tmp_path: Path) -> None:
    """One that is refused, or dies, must not leave the others waiting for it."""
    with keeping(tmp_path):
        first = Rank(tmp_path, rank=0)
        assert first.hear()

        def ask(rank: Rank, serial: int) -> tuple[object, object]:
            rank.say({"kind": "begin", "serial": serial, "everywhere": 0})
            told = rank.hear() or {}
            return told["kind"], told.get("why", "")

        assert ask(first, 1) == ("skipped", "rank 1 has not found the keeper yet")
        second = Rank(tmp_path, rank=1)
        assert second.hear()
        assert ask(second, 1) == ("skipped", "another rank of this node was not ready for it")
        assert [ask(rank, 2)[0] for rank in (first, second)] == ["go", "go"]
        first.say({"kind": "failed", "serial": 2, "why": "a test"})
        assert [(rank.hear() or {})["why"] for rank in (first, second)] == ["rank 0: a test"] * 2
        assert ask(second, 2)[0] == "skipped"  # a late one
        assert ask(first, 3)[0] == "go"
        second.socket.shutdown(socket.SHUT_RDWR)
        assert (first.hear() or {})["why"] == "rank 1 hung up"


@pytest.mark.usefixtures("processes")
def test_two_ranks_go_on_with_the_next_keeper(tmp_path: Path) -> None:
    """Whichever finds it first: neither waits for the other, and soon both have snapshots again."""
    root = tmp_path / "memory"
    waits: list[float] = []

    def train(team: ThreadTeam) -> None:
        snapshots = Snapshotter(None, root, team)
        good = step = 0
        while good < 5:
            step += 1
            assert step < 500
            snapshots.snapshot(step, rows_of(team.rank, 2, step))
            began = time.monotonic()
            outcome = snapshots.settle()
            waits.append(time.monotonic() - began)
            assert outcome is not None
            good += bool(outcome.generation)
            if step == 3 and team.rank == 0:
                os.kill(snapshots.keeper_pid, signal.SIGKILL)
            team.together(lambda: time.sleep(0.05))
        snapshots.close(finished=True)

    all_of(on_ranks(2, train))
    assert max(waits) < 5
    wait_for(lambda: not root.exists())


def test_whoever_is_left_of_an_earlier_start_is_not_listened_to(tmp_path: Path) -> None:
    with keeping(tmp_path):
        old = [Rank(tmp_path, rank=rank) for rank in (0, 1)]
        assert old[0].hear() and old[1].hear()
        old[0].say({"kind": "begin", "serial": 1, "everywhere": 0})
        assert (old[0].hear() or {})["kind"] == "go"
        new = Rank(tmp_path, session="t", incarnation=2, ranks=[0])
        assert (new.hear() or {})["kind"] == "welcome"
        for rank in old:
            assert (rank.hear() or {})["kind"] == "skipped" and rank.hear() is None
        for changes in ({}, {"session": "another that is older", "incarnation": 1}):
            assert Rank(tmp_path, **changes).hear() is None
        new.say({"kind": "begin", "serial": 1, "everywhere": 0})
        assert (new.hear() or {})["kind"] == "go"  # undisturbed
        same = Rank(tmp_path, session="u", incarnation=2, ranks=[0])  # a library that does not count its starts
        assert (same.hear() or {})["kind"] == "welcome"
        assert Rank(tmp_path, session="t", incarnation=2, ranks=[0]).hear() is None


@pytest.mark.parametrize("looks", [True, False], ids=["left to it", "control: used again"])
def test_who_is_left_of_an_earlier_start_may_write_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """A rank that its launcher did not kill, in the middle of a copy, has nothing in common with its successor's."""
    root = tmp_path / "memory"
    go_on, copying_it = threading.Event(), threading.Event()

    def slowly(part: Any, piece: Piece, target: memoryview) -> None:
        if piece.tensor.flatten()[0] < 0:
            copying_it.set()
            assert go_on.wait(WAIT_S)
        copy_part(part, piece, target)

    monkeypatch.setattr(copying, "copy_part", slowly)
    if not looks:
        monkeypatch.setattr(keeper, "has_living_starts", lambda *_: False)
    with keeping(root):
        old = Snapshotter(None, root, run_id="r", incarnation=1)
        old.snapshot(1, rows_of(0, 1, -5))
        assert copying_it.wait(WAIT_S)
        new = Snapshotter(None, root, run_id="r", incarnation=2)
        new.snapshot(2, rows_of(0, 1, 2))
        assert (outcome := new.settle()) is not None and outcome.generation
        go_on.set()
        assert (outcome := old.settle()) is not None and not outcome.generation
        if looks:
            assert_equal(loaded(root)[0], rows_of(0, 1, 2))
        else:
            with pytest.raises(DamagedError):
                loaded(root)
        old.close()
        new.close()


def test_a_run_that_finished_without_its_keeper_leaves_no_memory(tmp_path: Path) -> None:
    root = tmp_path / "user" / "memory"
    with keeping(root):
        snapshots = Snapshotter(None, root)
        snapshots._keeper.client._starts = False
        snapshots.snapshot(1, rows_of(0, 1, 1))
        assert (outcome := snapshots.settle()) is not None and outcome.generation
    with keeper_lock(root) as lock:
        assert lock is not None
    snapshots.close(finished=True)
    assert not root.exists()


@pytest.mark.usefixtures("long")
def test_it_waits_for_who_reads_and_not_long_where_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "EMPTY_S", 0.5)
    root = tmp_path / "memory"
    with keeping(root) as empty:
        wait_for(lambda: not root.exists())
        assert not empty._stopped
    root = tmp_path / "another"
    with keeping(root, 0.3):
        snapshots = Snapshotter(None, root, keep_s=0.3)
        snapshots.snapshot(1, rows_of(0, 1, 1))
        outcome = snapshots.settle()
        assert outcome is not None
        hold = Hold(MappedStorage(root), outcome.generation, "read")
        snapshots.close()
        began = time.monotonic()
        while time.monotonic() - began < 1.5:  # the keeper looks every second
            assert (root / outcome.generation / COMMIT).exists()
            time.sleep(0.05)
        hold.release()
        wait_for(lambda: not root.exists())


def test_whose_directory_was_deleted_ends_and_leaves_its_successor_alone(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    with keeping(root) as first:
        shutil.rmtree(root)
        make_directory(root)
        wait_for(lambda: not any(thread.name == f"keeper of {root}" for thread in threading.enumerate()))
        assert read_secret(root) != first.protocol._secret
        with keeping(root):
            snapshots_of(root, range(1, 2))
            assert_equal(loaded(root)[0], rows_of(0, 1, 1))


@pytest.mark.parametrize(("number", "there"), [(errno.ESTALE, True), (errno.EIO, True), (errno.ENOENT, False)])
def test_a_look_that_fails_does_not_end_it(
    number: int, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the memory of a living run with it."""
    with keeping(tmp_path / "memory") as keeper_at_work:

        def fails(path: Path, **_: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", fails)
            assert keeper_at_work._is_there is there


def test_the_end_of_a_run_is_none_of_a_memory_that_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "memory"
    with keeping(root):
        snapshots = Snapshotter(None, root)

        def fails(path: Path, *_: object, **__: object) -> None:
            raise OSError(errno.ESTALE, "Stale file handle")

        with monkeypatch.context() as patch:
            for name in ("stat", "touch"):
                patch.setattr(Path, name, fails)
            snapshots.close(finished=True)
    assert "is freed later" in caplog.text


def test_files_of_another_size_than_was_told_are_not_committed(tmp_path: Path) -> None:
    with keeping(tmp_path):
        rank = Rank(tmp_path, ranks=[0])
        assert rank.hear()
        rank.say({"kind": "begin", "serial": 1, "everywhere": 0})
        arena = tmp_path / str((rank.hear() or {})["arena"])
        (arena / shard_name(0)).write_bytes(b"short")
        (arena / "index-00000.json").write_bytes(b"{}")
        writer = {"rank": 0, "shard_bytes": 6, "index_bytes": 2, "header": "", "index": "", "cover": []}
        rank.say({"kind": "layout", "layout": "l", "text": "{}"})
        head = {"step": 5, "save_id": "a" * 32, "serial": 1}
        rank.say(
            {"kind": "prepared", "serial": 1, "arena": arena.name, "writer": writer}
            | {"manifest": head, "layout": "l", "durable": False}
        )
        told = rank.hear() or {}
        assert told["kind"] == "skipped" and "has 5 bytes, and 6 were written" in str(told["why"])
        assert not list(tmp_path.glob("step-*"))


def snapshots_of(root: Path, steps: range, run_id: str = "r") -> None:
    snapshots = Snapshotter(None, root, run_id=run_id)
    for step in steps:
        snapshots.snapshot(step, rows_of(0, 1, step))
        assert (outcome := snapshots.settle()) is not None and outcome.generation
    snapshots.close()


def test_the_next_one_adopts_what_is_there(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    with keeping(root):
        snapshots_of(root, range(1, 4))
    # As a kill between a rename and its COMMIT leaves it.
    names = [g.name for g in candidates(MappedStorage(root))]
    (root / names[2] / COMMIT).unlink()
    with keeping(root):
        assert [g.name for g in candidates(MappedStorage(root))] == names[:2]
        snapshots_of(root, range(4, 6))
        assert [g.step for g in candidates(MappedStorage(root))] == [5, 4, 3]
        found, _ = loaded(root)
        assert_equal(found, rows_of(0, 1, 5))
    assert len([p for p in root.iterdir() if p.is_dir()]) == 3


def test_generations_of_another_run_make_room(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    with keeping(root):
        snapshots_of(root, range(1, 4), run_id="an old one")
        snapshots_of(root, range(1, 2), run_id="this one")
        assert [(g.step, g.manifest and g.manifest.run_id) for g in scan(MappedStorage(root))] == [(1, "this one")]


def test_damaged_memory_is_never_loaded(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    with keeping(root):
        snapshots_of(root, range(1, 4))
    newest = root / candidates(MappedStorage(root))[0].name
    whole = tmp_path / "whole"
    shutil.copytree(root, whole, ignore=shutil.ignore_patterns("keeper.*"))
    shard = (newest / shard_name(0)).read_bytes()
    flipped = bytearray(shard)
    flipped[len(shard) // 2] ^= 1
    for damage in (bytes(len(shard)), shard[:-4096], bytes(flipped), shard[:4096] + bytes(len(shard) - 4096)):
        (newest / shard_name(0)).write_bytes(damage)
        found, _ = loaded(root)
        assert_equal(found, rows_of(0, 1, 2))  # the one before
    for file in ("manifest.json", "index-00000.json", COMMIT):
        shutil.rmtree(root)
        shutil.copytree(whole, root)
        data = bytearray((newest / file).read_bytes())
        data[len(data) // 2] ^= 1
        (newest / file).write_bytes(data)
        found, _ = loaded(root)
        assert_equal(found, rows_of(0, 1, 2))
    # The shard of an older save of the same size, as a recycled directory would hold.
    shutil.rmtree(root)
    shutil.copytree(whole, root)
    older = root / candidates(MappedStorage(root))[2].name
    shutil.copy(older / shard_name(0), newest / shard_name(0))
    found, _ = loaded(root)
    assert_equal(found, rows_of(0, 1, 2))


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_the_process_outlives_who_started_it_ignores_signals_and_is_alone(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    make_directory(root)
    script = (
        "import sys, os; from pathlib import Path; from checkpointing.memory.client import start_keeper\n"
        "start_keeper(Path(sys.argv[1]), 1.0); os.kill(os.getpid(), 9)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(root)], start_new_session=True)
    assert starter.wait(WAIT_S) == -signal.SIGKILL
    wait_for(lambda: answers(root), 60)
    rank = Rank(root, ranks=[0], keep_s=1.0)
    pid = int(str((rank.hear() or {})["pid"]))
    assert os.getpgid(pid) != os.getpgrp() and os.getsid(pid) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(pid, number)
    assert main([str(root)]) == 0  # a second one ends at once
    rank.say({"kind": "begin", "serial": 1, "everywhere": 0})
    assert (rank.hear() or {})["kind"] == "go"
    rank.socket.shutdown(socket.SHUT_RDWR)
    began = time.monotonic()
    wait_for(lambda: not root.exists())
    assert time.monotonic() - began > 0.5
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_no_room_for_a_manifest_costs_that_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    root = tmp_path / "memory"
    with keeping(root):
        snapshots = Snapshotter(None, root)
        snapshots.snapshot(1, rows_of(0, 1, 1))
        assert (outcome := snapshots.settle()) is not None and outcome.generation
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            snapshots.snapshot(2, rows_of(0, 1, 2))
            assert (outcome := snapshots.settle()) is not None and "No space left" in outcome.why
        found, _ = loaded(root)
        assert_equal(found, rows_of(0, 1, 1))  # the older one is intact
        snapshots.snapshot(3, rows_of(0, 1, 3))
        assert (outcome := snapshots.settle()) is not None and outcome.generation
        snapshots.close()
