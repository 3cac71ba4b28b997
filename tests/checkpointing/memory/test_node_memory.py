"""What a node's memory holds: which generation may be written over, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointing import DamagedError, save
from checkpointing.format import ABANDONED, COMMIT, MANIFEST
from checkpointing.generations import candidates, newest, read_manifest
from checkpointing.lease import Hold
from checkpointing.memory import node_memory as module
from checkpointing.memory.mapped import MappedStorage
from checkpointing.memory.node_memory import NodeMemory
from tests.checkpointing.memory.test_snapshotter import assert_equal, loaded, rows_of


def memory_of(root: Path, flushed: set[str] | None = None) -> NodeMemory:
    memory = NodeMemory(root, lambda: flushed or set())
    memory.adopt()
    return memory


def put(root: Path, *steps: int, run_id: str = "r") -> list[str]:
    return [save(root, step, rows_of(0, 1, step), run_id=run_id) for step in steps]


def test_sound_generations_of_the_run_are_kept_and_the_rest_is_room(tmp_path: Path) -> None:
    names = put(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / names[1] / COMMIT).unlink()
    (tmp_path / names[2] / ABANDONED).touch()
    (tmp_path / names[3] / "shard-00000.safetensors").write_bytes(b"short")
    memory = memory_of(tmp_path)
    assert [kept.name for kept in memory.kept] == [names[4], names[0]]
    assert memory.free == [0, 1, 2] and not list(tmp_path.glob(f"arena-*/{MANIFEST}"))
    memory.start("r", 3, 0, anew=False)
    assert [kept.name for kept in memory.kept] == [names[4], names[0]] and len(memory.free) == 1
    assert list((tmp_path / f"arena-{memory.free[0]}").iterdir())  # memory that is there already
    memory.start("another", 3, 0, anew=False)
    assert not memory.kept and len(memory.free) == 3


def test_files_that_somebody_may_still_write_into_are_left_to_him(tmp_path: Path) -> None:
    put(tmp_path, 1, 2, 3)
    memory = memory_of(tmp_path)
    memory.start("r", 3, 0, anew=True)
    assert memory.free == [0] and not list((tmp_path / "arena-0").iterdir())
    assert candidates(MappedStorage(tmp_path))[0].sound


def test_what_is_read_or_flushed_stays_as_it_is(tmp_path: Path) -> None:
    names, flushed = put(tmp_path, 1, 2, 3), set[str]()
    memory = memory_of(tmp_path, flushed)
    flushed.add(names[0])
    memory = NodeMemory(tmp_path, lambda: flushed)
    memory.adopt()
    hold = Hold(MappedStorage(tmp_path), names[1], "read")
    assert memory.take(3, 3, ()) is None
    hold.release()
    assert memory.take(3, 3, ()) is not None
    assert [kept.name for kept in memory.kept] == [names[2], names[0]]


@pytest.mark.parametrize("looks_again", [True, False], ids=["twice", "control: once"])
def test_a_reader_that_comes_at_the_worst_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks_again: bool
) -> None:
    """Its hold is there after the first look, and it has found COMMIT."""
    names = put(tmp_path, 1, 2, 3)
    memory = memory_of(tmp_path)
    looks = []

    def held(storage: object) -> set[str]:
        looks.append(1)
        return {names[0]} if len(looks) % 2 == 0 and looks_again else set()

    monkeypatch.setattr(module, "held_generations", held)
    assert memory.take(3, 3, ()) is not None
    assert ((tmp_path / names[0] / COMMIT).exists(), (tmp_path / names[1]).exists()) == (looks_again, not looks_again)
    if looks_again:
        read_manifest(MappedStorage(tmp_path), names[0])


def test_the_last_one_that_all_nodes_have_is_never_written_over(tmp_path: Path) -> None:
    """However many newer ones this node commits and another does not."""
    names = put(tmp_path, 1)
    memory = memory_of(tmp_path)
    memory.start("r", 3, 0, anew=False)
    for step in range(2, 9):
        arena = memory.take(0, 3, ())
        assert arena is not None
        put_into(memory, arena, step)
        assert (tmp_path / names[0] / COMMIT).exists()
        assert len(memory.kept) <= 3
    serial = memory.kept[0].serial
    arena = memory.take(serial, 3, ())  # now all have this one
    assert arena is not None
    put_into(memory, arena, 9)
    for step in (10, 11, 12):
        arena = memory.take(serial, 3, ())
        assert arena is not None
        put_into(memory, arena, step)
    assert not (tmp_path / names[0]).exists()
    assert serial in [kept.serial for kept in memory.kept]


def test_a_keeper_that_is_started_anew_keeps_what_all_nodes_have(tmp_path: Path) -> None:
    """Though this node has a newer one, which another lacks."""
    root = tmp_path / "memory"
    names = put(root, 1, 2)
    serials = [read_manifest(MappedStorage(root), name).serial for name in names]
    memory = memory_of(root)
    memory.start("r", 3, serials[0], anew=False)
    for step in (3, 4, 5):
        arena = memory.take(serials[0], 3, ())
        assert arena is not None
        put_into(memory, arena, step)
        assert (root / names[0] / COMMIT).exists()


def put_into(memory: NodeMemory, arena: str, step: int) -> None:
    """Commit what a save of that step would be."""
    elsewhere = memory.root.parent / "elsewhere"
    (name,) = put(elsewhere, step)
    manifest = read_manifest(MappedStorage(elsewhere), name)
    for path in (memory.root / arena).iterdir():
        path.unlink()
    for file in manifest.writers[0].files:
        (memory.root / arena / file).write_bytes((elsewhere / name / file).read_bytes())
    data = (elsewhere / name / MANIFEST).read_bytes()
    memory.commit(arena, name, 100 + step, data, manifest.writers[0].files)


def test_a_commit_that_fails_leaves_an_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "memory"
    put(root, 1)
    memory = memory_of(root)
    arena = memory.take(0, 3, ())
    assert arena is not None
    with pytest.raises(FileNotFoundError):
        memory.commit(arena, "step-00000002-00000000", 2, b"", {"shard-00000.safetensors": 5})
    (root / arena / "shard-00000.safetensors").write_bytes(b"four")
    with pytest.raises(DamagedError, match="has 4 bytes, and 5 were written"):
        memory.commit(arena, "step-00000002-00000000", 2, b"", {"shard-00000.safetensors": 5})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            memory.commit(arena, "step-00000002-00000000", 2, b"{}", {"shard-00000.safetensors": 4})
    assert memory.free and (found := newest(MappedStorage(root))) is not None and found.step == 1
    assert_equal(loaded(root)[0], rows_of(0, 1, 1))
