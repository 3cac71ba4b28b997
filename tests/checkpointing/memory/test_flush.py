"""From memory to the disk: the same bytes, also past the page cache, and one commit for all nodes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointing import CheckpointError, DamagedError, load, save
from checkpointing.codec import encode_manifest
from checkpointing.format import digest
from checkpointing.generations import candidates, read_manifest
from checkpointing.memory.flush import STEP_BYTES, DirectStorage, flush
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.messages import Nodes
from checkpointing.storage import Buffer, FileStorage
from tests.checkpointing.memory.test_snapshotter import assert_equal, rows_of
from tests.harness.threads import all_of, on_ranks


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 70_000, STEP_BYTES, STEP_BYTES + 4096, STEP_BYTES + 17])
@pytest.mark.parametrize("mapped", [True, False])
def test_every_size_is_written_as_it_is(tmp_path: Path, nbytes: int, mapped: bool) -> None:
    data = os.urandom(nbytes)
    (tmp_path / "from").write_bytes(data)
    chunk = MappedStorage(tmp_path).read_ranges("from", [(0, nbytes)])[0] if mapped else data
    DirectStorage(tmp_path / "to").put("g/f", [chunk])
    assert (tmp_path / "to" / "g" / "f").read_bytes() == data


def test_a_rate_is_kept_to(tmp_path: Path) -> None:
    began = time.monotonic()
    DirectStorage(tmp_path, rate=1e6).put("f", [bytes(300_000)])
    assert time.monotonic() - began >= 0.29


def test_a_flush_is_the_same_generation(tmp_path: Path) -> None:
    name = save(tmp_path / "memory", 4, rows_of(0, 1, 4), {"k": 1})
    written = flush(MappedStorage(tmp_path / "memory"), DirectStorage(tmp_path / "disk"), name)
    for path in (tmp_path / "memory" / name).iterdir():
        assert (tmp_path / "disk" / name / path.name).read_bytes() == path.read_bytes()
    assert written == sum(p.stat().st_size for p in (tmp_path / "disk" / name).iterdir() if p.name[0] in "si")
    assert flush(MappedStorage(tmp_path / "memory"), FileStorage(tmp_path / "disk"), name) == written  # once more
    assert [g.sound for g in candidates(FileStorage(tmp_path / "disk"))] == [True]


def split_over_nodes(tmp_path: Path) -> str:
    """What one save of two ranks is in memory where each rank is on a node of its own."""
    name = all_of(on_ranks(2, lambda team: save(tmp_path / "whole", 4, rows_of(team.rank, 2, 4), {"k": 1}, team)))[0]
    manifest = read_manifest(FileStorage(tmp_path / "whole"), name)
    assert len(manifest.writers) == 2
    for node, writer in enumerate(manifest.writers):
        directory = tmp_path / f"node-{node}" / name
        directory.mkdir(parents=True)
        for file in writer.files:
            (directory / file).write_bytes((tmp_path / "whole" / name / file).read_bytes())
        data = encode_manifest(replace(manifest, writers=[writer]))
        (directory / "manifest.json").write_bytes(data)
        (directory / "COMMIT").write_text(digest(data))
    return name


def test_nodes_commit_together(tmp_path: Path) -> None:
    name = split_over_nodes(tmp_path)
    threads = [
        threading.Thread(
            target=flush,
            args=(MappedStorage(tmp_path / f"node-{node}"), FileStorage(tmp_path / "disk"), name, Nodes(node, 2), 30),
        )
        for node in (1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {p.name: p.read_bytes() for p in (tmp_path / "disk" / name).iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole" / name).iterdir()
    }


class Slow(FileStorage):
    """A disk where what the second node puts has its name long before its content."""

    def put(self, name: str, chunks: Iterable[Buffer]) -> None:
        if "-00001." in name:
            super().put(name, [b""])
            time.sleep(0.3)  # the first node looks every 0.05 s
        super().put(name, chunks)


def test_what_a_node_tells_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    name = split_over_nodes(tmp_path)
    disk = Slow(tmp_path / "disk")
    arguments = [(MappedStorage(tmp_path / f"node-{node}"), disk, name, Nodes(node, 2), 30) for node in (1, 0)]
    with ThreadPoolExecutor(2) as both:
        for flushed in [both.submit(flush, *one) for one in arguments]:
            assert flushed.result(60) > 0
    assert [generation.sound for generation in candidates(FileStorage(tmp_path / "disk"))] == [True]


def test_a_node_that_does_not_come_means_no_commit(tmp_path: Path) -> None:
    name = split_over_nodes(tmp_path)
    with pytest.raises(CheckpointError, match=r"the other nodes wrote nothing of their parts for 0 s"):
        flush(MappedStorage(tmp_path / "node-0"), FileStorage(tmp_path / "disk"), name, Nodes(0, 2), 0.2)
    assert not candidates(FileStorage(tmp_path / "disk"))


def test_a_node_that_is_slow_is_waited_for_as_long_as_it_writes(tmp_path: Path) -> None:
    name, disk = split_over_nodes(tmp_path), FileStorage(tmp_path / "disk")
    came = threading.Event()

    def other() -> int:
        for part in range(20):  # for longer than the first waits for a node that writes nothing
            disk.put(f"{name}/shard-00001.safetensors", [b"x" * (part + 1)])
            time.sleep(0.05)
        came.set()
        return flush(MappedStorage(tmp_path / "node-1"), disk, name, Nodes(1, 2), 30)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(other)
        assert flush(MappedStorage(tmp_path / "node-0"), disk, name, Nodes(0, 2), 0.5) > 0
        assert came.is_set() and second.result(60) > 0


def test_a_part_is_never_committed_as_the_whole(tmp_path: Path) -> None:
    """A keeper that is told of one node where there are two would leave a generation with holes."""
    name = split_over_nodes(tmp_path)
    for node in (0, 1):
        with pytest.raises(DamagedError, match="is not among its writers"):
            flush(MappedStorage(tmp_path / f"node-{node}"), FileStorage(tmp_path / "disk"), name)
    assert not candidates(FileStorage(tmp_path / "disk"))


def test_memory_of_another_node_is_not_enough_for_a_load(tmp_path: Path) -> None:
    """The rank that lacks bytes says so, and all take the disk."""
    split_over_nodes(tmp_path)
    found = {}

    def loads(team: object) -> None:
        rank = team.rank  # type: ignore[attr-defined]
        pieces = rows_of(1 - rank, 2, -1)  # each needs what the other's node has
        tiers = [MappedStorage(tmp_path / f"node-{rank}"), FileStorage(tmp_path / "whole")]
        load(tiers, pieces, group=team, chosen=lambda storage, _: found.setdefault(rank, str(storage)))  # type: ignore[arg-type]
        assert_equal(pieces, rows_of(1 - rank, 2, 4))

    all_of(on_ranks(2, loads))
    assert found == {rank: str(tmp_path / "whole") for rank in (0, 1)}

    def loads_own(team: object) -> None:
        rank = team.rank  # type: ignore[attr-defined]
        pieces = rows_of(rank, 2, -1)[:1]
        tiers = [MappedStorage(tmp_path / f"node-{rank}"), FileStorage(tmp_path / "whole")]
        load(tiers, pieces, group=team, only=["matrix"], chosen=lambda storage, _: found.update({rank: str(storage)}))  # type: ignore[arg-type]
        assert_equal(pieces, rows_of(rank, 2, 4)[:1])

    all_of(on_ranks(2, loads_own))
    assert found == {rank: str(tmp_path / f"node-{rank}") for rank in (0, 1)}


def test_a_plan_made_for_one_nodes_memory_is_not_used_for_the_disk(tmp_path: Path) -> None:
    """The same save id lists other writers there: the positions of the one are other ranks' files in the other."""
    split_over_nodes(tmp_path)
    for directory in ("node-1", "whole"):
        pieces = rows_of(1, 2, -1)[:1]
        load(MappedStorage(tmp_path / directory), pieces, only=["matrix"])
        assert_equal(pieces, rows_of(1, 2, 4)[:1])
