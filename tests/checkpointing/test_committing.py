"""COMMIT vouches for what is there, and for nothing else; and no other module writes it."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from checkpointing import DamagedError, LayoutError, save
from checkpointing.codec import encode_manifest
from checkpointing.committing import commit, commit_in_memory, reinstate, withdraw
from checkpointing.format import COMMIT, MANIFEST, Manifest
from checkpointing.generations import candidates, read_manifest
from checkpointing.storage import FileStorage
from tests.checkpointing.memory.test_snapshotter import rows_of
from tests.harness.processes import ROOT


@pytest.fixture
def uncommitted(tmp_path: Path) -> tuple[FileStorage, Manifest, Path]:
    """A generation whose manifest and COMMIT are not there yet."""
    name = save(tmp_path, 1, rows_of(0, 1, 1))
    storage = FileStorage(tmp_path)
    manifest = read_manifest(storage, name)
    storage.delete([f"{name}/{MANIFEST}", f"{name}/{COMMIT}"])
    return storage, manifest, tmp_path / name


def test_a_commit_is_the_last_thing_and_may_be_made_again(uncommitted: tuple[FileStorage, Manifest, Path]) -> None:
    storage, manifest, directory = uncommitted
    there = []
    commit(storage, manifest, guard=lambda: there.extend(path.name for path in directory.iterdir()))
    assert MANIFEST in there and COMMIT not in there
    before = (directory / MANIFEST).stat().st_mtime_ns
    commit(storage, replace(manifest, created=0.0), guard=lambda: pytest.fail("it is committed"))
    assert (directory / MANIFEST).stat().st_mtime_ns == before and candidates(storage)[0].sound


def test_nothing_is_committed_that_is_not_there_or_not_allowed(
    uncommitted: tuple[FileStorage, Manifest, Path],
) -> None:
    storage, manifest, directory = uncommitted

    def stop() -> None:
        raise LayoutError("a test")

    with pytest.raises(LayoutError, match="a test"):
        commit(storage, manifest, guard=stop)
    with pytest.raises(DamagedError, match="rank 0 wrote to it"):
        commit(storage, replace(manifest, writers=[replace(manifest.writers[0], rank=1)], world_size=2))
    with pytest.raises(LayoutError, match="could not be read again"):
        commit(storage, replace(manifest, writers=[]))
    shard = directory / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="shard-00000"):
        commit(storage, manifest)
    assert not (directory / COMMIT).exists()


def test_in_memory_an_arena_becomes_a_generation_or_stays_one(
    uncommitted: tuple[FileStorage, Manifest, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, manifest, directory = uncommitted
    arena = directory.rename(directory.parent / "arena-0")
    data, files = encode_manifest(manifest), manifest.writers[0].files
    with pytest.raises(DamagedError, match=r"shard-00000\.safetensors has"):
        commit_in_memory(arena, directory, data, {"shard-00000.safetensors": 1})
    with monkeypatch.context() as patch:

        def full(path: Path, text: str) -> None:
            raise OSError("no room")

        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no room"):
            commit_in_memory(arena, directory, data, files)
    assert arena.is_dir() and not directory.exists()
    commit_in_memory(arena, directory, data, files)
    assert candidates(storage)[0].sound
    withdraw(directory)
    assert candidates(storage) == []
    reinstate(directory)
    assert candidates(storage)[0].sound
    withdraw(directory.parent)  # which has none


def test_no_other_module_writes_a_manifest_or_its_commit() -> None:
    """Calls that write, and name one of them, by the source."""
    writes = {"put", "create_if_absent", "write_bytes", "write_text", "rename", "replace", "replace_file", "link"}
    found = set()
    for path in sorted((ROOT / "checkpointing").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in writes:
                names = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node)}
                names |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                if names & {"COMMIT", "MANIFEST", "manifest.json"}:
                    found.add(path.name)
    assert found == {"committing.py"}
