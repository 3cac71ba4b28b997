"""What DeepSpeed saved, imported: bit for bit what its engines held."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointing import DamagedError, MismatchError, NotFoundError, save
from checkpointing.diff import compare
from checkpointing.foreign import describe_foreign
from checkpointing.foreign.deepspeed import describe_deepspeed, newest_tag
from checkpointing.generations import read_manifest
from checkpointing.layouts.zero import describe_zero
from checkpointing.reader import GenerationReader
from checkpointing.storage import FileStorage
from tests.checkpointing.zero_engines import ENGINES, LOW, Kind, start, train_engine
from tests.harness.worlds import SharedWorld

KINDS = [kind for kind in [*ENGINES, *LOW] if kind[0]]


def train_and_save(directory: str, kinds: list[Kind]) -> list[str]:
    """Two steps under each engine; saved by DeepSpeed, and by us."""
    names = []
    for kind in kinds:
        where = Path(directory, name_of(kind))
        engine = start(kind)
        train_engine(engine, [1, 2])
        names.append(save(where / "ours", 2, describe_zero(engine)))
        engine.save_checkpoint(str(where / "theirs"), tag="two")
    return names


def name_of(kind: Kind) -> str:
    return "-".join(map(str, kind))


def reader(directory: Path, name: str) -> GenerationReader:
    storage = FileStorage(directory)
    return GenerationReader(storage, read_manifest(storage, name))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_import_holds_what_the_engine_held(tmp_path: Path, size: int, world: SharedWorld) -> None:
    for kind, ours in zip(KINDS, world.run(train_and_save, size, str(tmp_path), KINDS)[0], strict=True):
        where = tmp_path / name_of(kind)
        foreign = describe_foreign(where / "theirs", trust_pickle=True)
        assert foreign.step == 2 and f"ZeRO stage {kind[0]}, {size} rank" in foreign.kind
        theirs = save(where / "imported", 2, foreign.pieces)
        differing = [
            d for d in compare(reader(where / "ours", ours), reader(where / "imported", theirs)) if d.state != "equal"
        ]
        # What is frozen computes in few bits, and so does what DeepSpeed keeps of it.
        assert not differing, (kind, differing)
        manifest = read_manifest(FileStorage(where / "imported"), theirs)
        assert manifest.stored_name("model/head.weight") == manifest.stored_name("model/embedding.weight")


def test_a_moment_that_was_changed_is_seen(tmp_path: Path, world: SharedWorld) -> None:
    """The control of the comparison above."""
    kind = KINDS[0]
    ours = world.run(train_and_save, 2, str(tmp_path), [kind])[0][0]
    where = tmp_path / name_of(kind)
    foreign = describe_foreign(where / "theirs", trust_pickle=True)
    next(p for p in foreign.pieces if p.name == "optim/inner.bias/exp_avg").tensor.view(-1)[0] += 1
    theirs = save(where / "imported", 2, foreign.pieces)
    found = compare(reader(where / "ours", ours), reader(where / "imported", theirs))
    assert sum(d.state != "equal" for d in found) == 1
    # Copy-on-write: the file is as it was.
    again = save(where / "again", 2, describe_foreign(where / "theirs", trust_pickle=True).pieces)
    assert all(d.state == "equal" for d in compare(reader(where / "ours", ours), reader(where / "again", again)))


def test_what_is_not_whole_is_refused(tmp_path: Path, world: SharedWorld) -> None:
    world.run(train_and_save, 2, str(tmp_path), [(2, False, 32), (3, False, 32)])
    theirs = tmp_path / name_of((2, False, 32)) / "theirs"
    (theirs / "latest").write_text("three")
    with pytest.raises(NotFoundError, match="names three, which is not there"):
        newest_tag(theirs)
    files = sorted((theirs / "two").glob("*optim_states.pt"))
    files[1].rename(tmp_path / "kept")
    with pytest.raises(NotFoundError, match=r"lacks the optimizer states of ranks \[1\] of 2"):
        describe_deepspeed(theirs / "two")
    files[1].write_bytes((tmp_path / "kept").read_bytes()[:-100])
    with pytest.raises(DamagedError, match=files[1].name):
        describe_deepspeed(theirs / "two")
    files[1].rename(files[1].with_name("zero_pp_rank_0_mp_rank_01_optim_states.pt"))
    with pytest.raises(MismatchError, match="under tensor or pipeline parallelism"):
        describe_deepspeed(theirs / "two")
