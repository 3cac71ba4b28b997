"""Loading: completeness, damage, and the decision that all ranks make together."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from checkpointing import (
    DamagedError,
    LayoutError,
    MismatchError,
    NotFoundError,
    Piece,
    UnreadableError,
    VersionError,
    load,
    loading,
    save,
    small_files,
)
from checkpointing import reader as reader_module
from checkpointing.format import digest
from checkpointing.generations import abandon, scan
from checkpointing.reader import GenerationReader
from checkpointing.retention import Keep, prune
from checkpointing.storage import FileStorage
from checkpointing.stores import MemoryStorage
from tests.harness.threads import ThreadTeam, all_of, on_ranks


def pieces(value: float, *names: str, rows: int = 40) -> list[Piece]:
    return [
        Piece(name, torch.full((rows, 500), value), (0, 0), (rows, 500)) for name in names or ("model/a", "optim/a/m")
    ]


def values(loaded: list[Piece]) -> list[float]:
    assert all(len(p.tensor.unique()) == 1 for p in loaded)
    return [float(p.tensor.flatten()[0]) for p in loaded]


def test_the_newest_is_loaded_and_a_named_step_on_request(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, pieces(float(step)), {"step": step})
    target = pieces(0.0)
    assert load(tmp_path, target) == {"step": 2} and values(target) == [2.0, 2.0]
    assert load(tmp_path, target, step=1) == {"step": 1} and values(target) == [1.0, 1.0]
    name = next(g.name for g in scan(FileStorage(tmp_path)) if g.step == 2)
    assert load(tmp_path, target, generation=name) == {"step": 2}


def test_a_later_incarnation_overtakes_a_later_step(tmp_path: Path) -> None:
    save(tmp_path, 30, pieces(1.0), incarnation=1)
    save(tmp_path, 25, pieces(2.0), incarnation=2)
    target = pieces(0.0)
    load(tmp_path, target)
    assert values(target) == [2.0, 2.0]


def test_abandoned_generations_are_only_loaded_by_name(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, pieces(float(step)))
    storage = FileStorage(tmp_path)
    abandon(storage, [g for g in scan(storage) if g.step == 2])
    target = pieces(0.0)
    load(tmp_path, target)
    assert values(target) == [1.0, 1.0]
    load(tmp_path, target, step=2)
    assert values(target) == [2.0, 2.0]


def test_nothing_to_load_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no committed generation in"):
        load(tmp_path / "absent", pieces(0.0))
    save(tmp_path, 1, pieces(1.0))
    with pytest.raises(NotFoundError, match="generation of step 9"):
        load(tmp_path, pieces(0.0), step=9)


def test_missing_left_over_and_misshapen_tensors(tmp_path: Path) -> None:
    save(tmp_path, 1, pieces(1.0))
    with pytest.raises(MismatchError, match="does not hold 1 of the tensors asked for: model/b"):
        load(tmp_path, pieces(0.0, "model/a", "optim/a/m", "model/b"))
    with pytest.raises(MismatchError, match="holds 1 tensors that nothing asks for: optim/a/m; pass `only`"):
        load(tmp_path, pieces(0.0, "model/a"))
    with pytest.raises(MismatchError, match="of another shape"):
        load(tmp_path, pieces(0.0, rows=41))
    target = pieces(0.0, "model/a", "other/x")
    load(tmp_path, target, only=["model/"])
    assert values(target) == [1.0, 0.0]


def test_a_tensor_that_any_rank_asks_for_is_not_left_over(tmp_path: Path) -> None:
    save(tmp_path, 1, pieces(1.0))
    targets = [pieces(0.0, "model/a"), pieces(0.0, "optim/a/m")]
    all_of(on_ranks(2, lambda team: load(tmp_path, targets[team.rank], group=team)))
    assert [values(t) for t in targets] == [[1.0], [1.0]]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit in the data": lambda d: flip(d / "shard-00000.safetensors", 5000),
    "a flipped bit in the header's padding": lambda d: flip(d / "shard-00000.safetensors", 4090),
    "a truncated shard": lambda d: (d / "shard-00000.safetensors").write_bytes(
        (d / "shard-00000.safetensors").read_bytes()[:8192]
    ),
    "trailing bytes": lambda d: (d / "shard-00000.safetensors").open("ab").write(b"x"),
    "a missing shard": lambda d: (d / "shard-00000.safetensors").unlink(),
    "a missing index": lambda d: (d / "index-00000.json").unlink(),
    "a flipped bit in the index": lambda d: flip(d / "index-00000.json", 100),
    "a flipped bit in the manifest": lambda d: flip(d / "manifest.json", 50),
    "a missing manifest": lambda d: (d / "manifest.json").unlink(),
    "a wrong COMMIT": lambda d: (d / "COMMIT").write_text("0" * 32),
    "an empty COMMIT": lambda d: (d / "COMMIT").write_text(""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_detected_and_the_previous_generation_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    save(tmp_path, 1, pieces(1.0), {"step": 1})
    DAMAGE[what](tmp_path / save(tmp_path, 2, pieces(2.0), {"step": 2}))
    target = pieces(0.0)
    with caplog.at_level(logging.WARNING, logger="checkpointing"):
        assert load(tmp_path, target) == {"step": 1}
    assert values(target) == [1.0, 1.0]
    assert "is damaged and is passed over" in caplog.text
    with pytest.raises(DamagedError):
        load(tmp_path, target, step=2)


def test_a_shard_of_another_save_is_detected(tmp_path: Path) -> None:
    first = save(tmp_path, 1, pieces(1.0))
    second = save(tmp_path, 2, pieces(1.0))  # the very same data
    shutil.copy(tmp_path / first / "shard-00000.safetensors", tmp_path / second / "shard-00000.safetensors")
    with pytest.raises(DamagedError, match="the header is not the one that was committed"):
        load(tmp_path, pieces(0.0), step=2)


def test_without_a_sound_generation_the_error_says_so(tmp_path: Path) -> None:
    DAMAGE["a missing shard"](tmp_path / save(tmp_path, 1, pieces(1.0)))
    with pytest.raises(
        DamagedError, match=r"every generation in .* is damaged \(.* is missing.*\)\. The tensors .* must not be used"
    ):
        load(tmp_path, pieces(0.0))


def test_damage_that_one_rank_sees_sends_all_to_the_previous_generation(tmp_path: Path) -> None:
    def layout(value: float, rank: int) -> list[Piece]:
        return [Piece("model/w", torch.full((40, 500), value), (40 * rank, 0), (80, 500))]

    for step in (1, 2):
        all_of(on_ranks(2, lambda team, s=step: save(tmp_path, s, layout(float(s), team.rank), {"step": s}, team)))
    newest = next(g.name for g in scan(FileStorage(tmp_path)) if g.step == 2)
    flip(tmp_path / newest / "shard-00001.safetensors", 6000)  # rank 0 does not read it
    targets = [layout(0.0, rank) for rank in range(2)]

    def read(team: ThreadTeam) -> dict:
        return load(tmp_path, targets[team.rank], group=team)

    assert all_of(on_ranks(2, read)) == [{"step": 1}] * 2
    assert [values(t) for t in targets] == [[1.0], [1.0]]


class Changed(MemoryStorage):
    """A storage that gives back one object other than it was written."""

    def __init__(self, original: MemoryStorage) -> None:
        super().__init__()
        self._objects = dict(original._objects)

    def replace(self, name: str, data: bytes) -> None:
        self._objects[name] = data


@pytest.mark.usefixtures("long")
def test_every_flipped_byte_of_a_small_checkpoint_is_detected() -> None:
    """Of every file, the padding of the header included; and what is not flipped loads."""
    small = [Piece("model/w", torch.randn(5, 7), (0, 0), (5, 7)), Piece("optim/w/step", torch.tensor(3.0), (), ())]
    written = MemoryStorage()
    save(written, 1, small, {"step": 1})
    target = [Piece("model/w", torch.zeros(5, 7), (0, 0), (5, 7)), Piece("optim/w/step", torch.tensor(0.0), (), ())]
    undetected = []
    for name, original in list(written._objects.items()):
        storage = Changed(written)
        for position in range(len(original)):
            changed = bytearray(original)
            changed[position] ^= 1 << position % 8
            storage.replace(name, bytes(changed))
            try:
                load(storage, target, step=1)
                undetected.append((name, position))
            except DamagedError:
                pass
    assert undetected == []
    load(written, target, step=1)
    assert torch.equal(target[0].tensor, small[0].tensor) and target[1].tensor.item() == 3.0


def test_truncation_at_every_page_sends_all_ranks_to_the_previous_generation() -> None:
    def layout(value: float, rank: int) -> list[Piece]:
        tensor = torch.full((50, 400), value) if rank == 0 else torch.full((30, 400), value)
        return [Piece("model/w", tensor, (50 * rank, 0), (80, 400)), Piece("s", torch.tensor(value), (), ())]

    written = MemoryStorage()
    for step in (1, 2):
        all_of(on_ranks(2, lambda team, s=step: save(written, s, layout(float(s), team.rank), {"step": s}, team)))
    cuts = 0
    for name, original in list(written._objects.items()):
        if not name.startswith("step-00000002"):
            continue
        for size in range(0, len(original), 4096):
            storage = Changed(written)
            storage.replace(name, original[:size])
            targets = [layout(0.0, rank) for rank in range(2)]
            found = all_of(on_ranks(2, lambda team, t=targets, s=storage: load(s, t[team.rank], group=team)))
            assert found == [{"step": 1}] * 2 and [values(t) for t in targets] == [[1.0, 1.0]] * 2, (name, size)
            cuts += 1
    assert cuts > 30
    # The control: without a cut, the newer one.
    assert all_of(on_ranks(2, lambda team: load(written, layout(0.0, team.rank), group=team))) == [{"step": 2}] * 2


def test_a_damaged_last_save_of_a_step_is_not_replaced_by_the_one_before(tmp_path: Path) -> None:
    first = save(tmp_path, 30, pieces(1.0), incarnation=1)
    DAMAGE["a flipped bit in the manifest"](tmp_path / save(tmp_path, 30, pieces(2.0), incarnation=2))
    with pytest.raises(DamagedError, match=r"may be the last save of that step; name another one with `generation`"):
        load(tmp_path, pieces(0.0), step=30)
    load(tmp_path, pieces(0.0), generation=first)


def test_what_a_newer_release_wrote_is_not_passed_over(tmp_path: Path) -> None:
    first = save(tmp_path, 1, pieces(1.0))
    directory = tmp_path / save(tmp_path, 2, pieces(2.0))
    text = (directory / "manifest.json").read_bytes().replace(b'"version":1', b'"version":2')
    (directory / "manifest.json").write_bytes(text)
    (directory / "COMMIT").write_text(digest(text))
    with pytest.raises(VersionError, match="has format version 2, and this library reads version 1"):
        load(tmp_path, pieces(0.0))
    load(tmp_path, pieces(0.0), generation=first)


@pytest.mark.parametrize("file", ["shard-00000.safetensors", "index-00000.json", "manifest.json", "COMMIT"])
@pytest.mark.parametrize("times", [1, 1000])
def test_a_read_error_is_no_damage(file: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read again, and then the load fails: what lies there may be sound, and nothing is passed over for it."""
    save(tmp_path, 1, pieces(1.0))
    bad = tmp_path / save(tmp_path, 2, pieces(2.0)) / file
    preadv, left = os.preadv, times

    def failing(descriptor: int, buffers: list[memoryview], position: int) -> int:
        nonlocal left
        if left and os.readlink(f"/proc/self/fd/{descriptor}") == str(bad):
            left -= 1
            raise OSError(5, "Input/output error")
        return preadv(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", failing)
    monkeypatch.setattr(small_files, "RETRY_S", (0.0, 0.0))
    target = pieces(0.0)
    if times == 1:
        load(tmp_path, target)
        assert values(target) == [2.0, 2.0]
        return
    for asked in ({}, {"step": 2}):
        with pytest.raises(UnreadableError, match="Input/output error"):
            load(tmp_path, target, **asked)  # type: ignore[arg-type]
    left = 0
    bad.write_bytes(b"x" + bad.read_bytes()[1:])  # the control: damage is passed over
    load(tmp_path, target)
    assert values(target) == [1.0, 1.0]


def test_a_run_that_goes_on_while_it_is_read_does_not_look_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the hold, the run saves and deletes what was listed."""
    save(tmp_path, 1, pieces(1.0))
    hold = loading.hold

    def overtaken(storage: FileStorage, name: str) -> object:
        monkeypatch.setattr(loading, "hold", hold)
        save(tmp_path, 2, pieces(2.0))
        prune(FileStorage(tmp_path), Keep(1))
        return hold(storage, name)

    monkeypatch.setattr(loading, "hold", overtaken)
    target = pieces(0.0)
    load(tmp_path, target)
    assert values(target) == [2.0, 2.0]


def test_what_is_being_loaded_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is held, the run may save and prune as it likes."""
    save(tmp_path, 1, pieces(1.0))
    read = loading.read_manifest

    def meanwhile(storage: FileStorage, name: str) -> object:
        save(tmp_path, 2, pieces(2.0))
        assert prune(FileStorage(tmp_path), Keep(1)) == []
        return read(storage, name)

    monkeypatch.setattr(loading, "read_manifest", meanwhile)
    target = pieces(0.0)
    load(tmp_path, target)
    assert values(target) == [1.0, 1.0]
    assert len(prune(FileStorage(tmp_path), Keep(1))) == 1  # it was let go
    assert {path.name[:4] for path in tmp_path.iterdir()} == {"step"}


def test_prefixes_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, pieces(1.0))
    with pytest.raises(MismatchError, match=r"nothing in the checkpoint has a name that starts with 'modle/'"):
        load(tmp_path, pieces(0.0), only=["modle/"])
    with pytest.raises(MismatchError, match="is one string; give a list"):
        load(tmp_path, pieces(0.0), only="model/")


def test_a_part_that_no_rank_asks_for_is_left_over(tmp_path: Path) -> None:
    save(tmp_path, 1, pieces(1.0, "model/a"))

    def part(start: int, stop: int) -> Piece:
        return Piece("model/a", torch.zeros(stop - start, 500), (start, 0), (40, 500))

    with pytest.raises(MismatchError, match=r"parts of 1 tensors .* model/a at \(30, 0\) of size \(10, 500\); pass"):
        load(tmp_path, [part(0, 30)])
    load(tmp_path, [part(0, 30)], only=["model/"])
    overlapping = [[part(0, 30)], [part(20, 40)]]
    all_of(on_ranks(2, lambda team: load(tmp_path, overlapping[team.rank], group=team)))
    assert all(values(t) == [1.0] for t in overlapping)


def test_ranks_that_load_apart_are_refused() -> None:
    storage = MemoryStorage()
    save(storage, 1, pieces(1.0))
    for options in ({"only": ["model/a"]}, {"step": 1}, {"cast": True}, {"generation": "x"}):
        found = on_ranks(2, lambda t, o=options: load(storage, pieces(0.0), group=t, **(o if t.rank == 0 else {})))
        assert all(isinstance(error, LayoutError) and "all ranks load alike" in str(error) for error in found)


def test_a_piece_that_one_rank_cannot_load_into_stops_all() -> None:
    storage = MemoryStorage()
    save(storage, 1, pieces(1.0))
    bad = [Piece("model/a", torch.zeros(1, 500).expand(40, 500), (0, 0), (40, 500))]
    found = on_ranks(2, lambda t: load(storage, pieces(0.0) if t.rank == 0 else bad, group=t))
    assert all(isinstance(error, LayoutError) and "model/a: several elements" in str(error) for error in found)


def test_damage_to_the_objects_sends_all_ranks_to_the_previous_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 needs nothing else of that index, and alone cannot read it."""
    storage = MemoryStorage()

    def half(value: float, rank: int) -> list[Piece]:
        return [Piece("w", torch.full((2, 3), value), (2 * rank, 0), (4, 3))]

    for step in (1, 2):
        all_of(on_ranks(2, lambda t, s=step: save(storage, s, half(float(s), t.rank), {"step": s}, t)))
    first = GenerationReader.objects.fget

    def objects(reader: GenerationReader) -> object:
        if threading.current_thread().name == "rank 1" and reader.manifest.step == 2:
            raise DamagedError("EIO")
        return first(reader)

    def work(team: ThreadTeam) -> dict:
        threading.current_thread().name = f"rank {team.rank}"
        return load(storage, half(0.0, team.rank), group=team)

    monkeypatch.setattr(GenerationReader, "objects", property(objects))
    assert all_of(on_ranks(2, work)) == [{"step": 1}] * 2


def test_the_same_load_again_is_not_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, planned = MemoryStorage(), []
    save(storage, 1, pieces(1.0))
    plan = reader_module.plan_load
    monkeypatch.setattr(reader_module, "plan_load", lambda *args: planned.append(1) or plan(*args))
    for _ in range(3):
        target = pieces(0.0)
        load(storage, target)
        assert values(target) == [1.0, 1.0]
    assert len(planned) == 1


def test_one_memory_with_two_divisors_is_loaded_only_where_both_agree() -> None:
    storage = MemoryStorage()
    save(storage, 1, [Piece("a", torch.full((3,), 2.0), (0,), (3,)), Piece("b", torch.full((3,), 4.0), (0,), (3,))])
    memory = torch.zeros(3)
    load(storage, [Piece("a", memory, (0,), (3,)), Piece("b", memory, (0,), (3,), divisor=2)])
    assert memory.tolist() == [2.0] * 3
    with pytest.raises(MismatchError, match="b and a are tied here"):
        load(storage, [Piece("a", memory, (0,), (3,)), Piece("b", memory, (0,), (3,), divisor=4)])
