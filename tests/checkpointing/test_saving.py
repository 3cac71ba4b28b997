"""Saving: any layout, all ranks or none, and nothing exists before COMMIT."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpointing import (
    DamagedError,
    External,
    LayoutError,
    LeaseHeldError,
    LostError,
    PeerError,
    Piece,
    load,
    save,
    small_files,
    storage,
)
from checkpointing.collective import Team
from checkpointing.format import CHECKSUMS
from checkpointing.generations import newest, scan
from checkpointing.retention import clear_leftovers
from checkpointing.storage import FileStorage
from checkpointing.stores import MemoryStorage
from tests.checkpointing.layouts_for_tests import assembled, bits, random_layout, random_tensors, same_bits
from tests.harness.threads import all_of, on_ranks


@pytest.mark.usefixtures("long")
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), before=st.integers(1, 6), after=st.integers(1, 6))
def test_any_layout_loads_into_any_layout(
    tmp_path_factory: pytest.TempPathFactory, seed: int, before: int, after: int
) -> None:
    rng = random.Random(seed)
    directory = tmp_path_factory.mktemp("any")
    tensors = random_tensors(rng, 5)
    source = random_layout(rng, tensors, before, empty=False)
    target = random_layout(rng, tensors, after, empty=True)
    all_of(on_ranks(before, lambda team: save(directory, 3, source[team.rank], {"step": 3}, team)))
    objects = all_of(on_ranks(after, lambda team: load(directory, target[team.rank], group=team)))
    assert objects == [{"step": 3}] * after
    loaded = assembled(tensors, target)
    assert all(same_bits(loaded[t.name], t.value) for t in tensors)
    # The comparison can fail: one bit of one tensor is enough.
    victim = next((t.name for t in tensors if t.value.numel()), None)
    if victim is not None:
        for piece in (p for pieces in target for p in pieces if p.name == victim and p.tensor.numel()):
            flip_a_bit(piece.tensor)
        changed = assembled(tensors, target)
        assert [t.name for t in tensors if not same_bits(changed[t.name], t.value)] == [victim]


def flip_a_bit(tensor: torch.Tensor) -> None:
    first = (0,) * tensor.dim()
    raw = bytearray(bits(tensor[first].reshape(1)))
    raw[0] ^= 1
    tensor[first] = torch.frombuffer(raw, dtype=tensor.dtype)[0]


def test_every_byte_of_the_state_is_stored_once(tmp_path: Path) -> None:
    rng = random.Random(1)
    tensors = random_tensors(rng, 8)
    layout = random_layout(rng, tensors, 4, empty=False)
    name = all_of(on_ranks(4, lambda team: save(tmp_path, 1, layout[team.rank], group=team)))[0]
    stored = 0
    for shard in (tmp_path / name).glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            stored += sum(opened.get_tensor(key).nbytes for key in opened.keys() if key != CHECKSUMS)  # noqa: SIM118
    assert stored == sum(t.value.nbytes for t in tensors if t.value.dim() > 0)


def one_piece(value: float = 1.0) -> list[Piece]:
    return [Piece("model/w", torch.full((100, 300), value), (0, 0), (100, 300))]


def test_a_generation_is_named_by_step_and_save(tmp_path: Path) -> None:
    first = save(tmp_path, 30, one_piece())
    again = save(tmp_path, 30, one_piece())
    assert first != again and first.startswith("step-00000030-") and len(first) == len("step-00000030-") + 8
    files = sorted(path.name for path in (tmp_path / first).iterdir())
    assert files == ["COMMIT", "index-00000.json", "manifest.json", "shard-00000.safetensors"]


def test_the_parent_is_the_newest_before(tmp_path: Path) -> None:
    save(tmp_path, 1, one_piece())
    save(tmp_path, 2, one_piece())
    second, first = scan(FileStorage(tmp_path))
    assert second.manifest and first.manifest
    assert second.manifest.parent == first.manifest.save_id and first.manifest.parent == ""


def test_one_failing_rank_fails_all_and_the_previous_stays_newest(tmp_path: Path) -> None:
    def pieces(rank: int) -> list[Piece]:
        return [Piece("model/w", torch.ones(50, 300), (50 * rank, 0), (100, 300))]

    all_of(on_ranks(2, lambda team: save(tmp_path, 1, pieces(team.rank), group=team)))

    class FullDisk(FileStorage):
        def put(self, name: str, chunks: object) -> None:
            if name.endswith("shard-00001.safetensors"):
                raise OSError("No space left on device")
            super().put(name, chunks)  # type: ignore[arg-type]

    failed = on_ranks(2, lambda team: save(FullDisk(tmp_path), 2, pieces(team.rank), group=team))
    assert isinstance(failed[0], PeerError) and str(failed[0]) == "rank 1: No space left on device"
    assert isinstance(failed[1], OSError)
    found = newest(FileStorage(tmp_path))
    assert found is not None and found.step == 1
    assert not [g for g in scan(FileStorage(tmp_path)) if g.step == 2]  # the room is given back


@pytest.mark.parametrize("last", ["shard-00000.safetensors", "index-00000.json", "manifest.json", "COMMIT"])
def test_killed_before_any_file_there_is_no_generation(tmp_path: Path, last: str) -> None:
    class Killed(BaseException):
        pass

    class DyingStorage(FileStorage):
        def put(self, name: str, chunks: object) -> None:
            if name.endswith(last):
                raise Killed
            super().put(name, chunks)  # type: ignore[arg-type]

        def create_if_absent(self, name: str, data: bytes) -> bool:
            if name.endswith(last):
                raise Killed
            return super().create_if_absent(name, data)

    save(tmp_path, 1, one_piece(1.0))
    with pytest.raises(Killed):
        save(DyingStorage(tmp_path), 2, one_piece(2.0))
    target = one_piece(0.0)
    load(tmp_path, target)
    assert target[0].tensor.unique().tolist() == [1.0]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for bad in ({"x": {1, 2}}, {"x": float("inf")}, {"x": torch.ones(1)}, {"x": {1: 2}}, {"x": (1, 2)}):
        with pytest.raises(LayoutError, match=r"objects must be plain (finite )?JSON values"):
            save(tmp_path, 1, one_piece(), bad)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="metrics must be finite numbers, and these are not: loss"):
        save(tmp_path, 1, one_piece(), metrics={"loss": float("nan"), "fine": 1.0})
    with pytest.raises(LayoutError, match="step -1 cannot be saved"):
        save(tmp_path, -1, one_piece())
    assert list(tmp_path.iterdir()) == []


def test_of_one_step_the_last_save_is_the_newest(tmp_path: Path) -> None:
    for number in range(12):  # save ids are random: by chance alone this passes once in thousands
        save(tmp_path, 30, one_piece(float(number)))
        target = one_piece(-1.0)
        load(tmp_path, target)
        load(tmp_path, again := one_piece(-1.0), step=30)
        assert target[0].tensor[0, 0] == again[0].tensor[0, 0] == number


def test_a_save_after_going_back_is_the_newest_only_in_a_new_incarnation(tmp_path: Path) -> None:
    save(tmp_path, 30, one_piece(1.0), incarnation=4)
    save(tmp_path, 40, one_piece(2.0))  # as part of the incarnation that is there
    assert [g.order[:2] for g in scan(FileStorage(tmp_path))] == [(4, 40), (4, 30)]
    save(tmp_path, 35, one_piece(3.0), incarnation=5)
    assert [g.step for g in scan(FileStorage(tmp_path))] == [35, 40, 30]


def test_ranks_that_save_different_steps_are_refused(tmp_path: Path) -> None:
    failed = on_ranks(2, lambda team: save(tmp_path, 30 + team.rank, one_piece(), group=team))
    assert all(
        isinstance(e, LayoutError) and "rank 1 saves with step 31, rank 0 with step 30" in str(e) for e in failed
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_committed_that_rank_0_does_not_see(tmp_path: Path) -> None:
    """Two machines with a directory of their own under the same name."""

    def halves(team: Team) -> str:
        piece = Piece("model/w", torch.ones(50, 300), (50 * team.rank, 0), (100, 300))
        return save(tmp_path / f"machine{team.rank}", 1, [piece], group=team)

    failed = on_ranks(2, halves)
    assert all(isinstance(e, DamagedError) and "shard-00001.safetensors is missing" in str(e) for e in failed)
    assert not list(tmp_path.rglob("COMMIT")) and not list(tmp_path.rglob("shard-*"))


def test_the_guard_has_the_last_word(tmp_path: Path) -> None:
    def refuse() -> None:
        (directory,) = tmp_path.glob("step-*")
        assert {p.name for p in directory.iterdir()} >= {"manifest.json", "shard-00000.safetensors"}
        raise LeaseHeldError("another process took over")

    with pytest.raises(LeaseHeldError):
        save(tmp_path, 1, one_piece(), guard=refuse)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, 1, one_piece(), guard=lambda: None)
    assert len(scan(FileStorage(tmp_path))) == 1


OPERATIONS = ("open", "write", "fsync", "mkdir", "link", "unlink", "rmdir")


@contextlib.contextmanager
def watched(before: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `before(name, arguments)` ahead of every operation on files by `os`, which pathlib uses too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:

            def operate(name: str, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
                before(name, arguments)
                return original(*arguments, **options)

            patch.setattr(os, name, functools.partial(operate, name, getattr(os, name)))
        yield


def test_everything_is_durable_before_commit_exists(tmp_path: Path) -> None:
    unsynced: set[str] = set()
    seen: list[str] = []

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        seen.append(name)
        if name == "write":
            unsynced.add(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        elif name == "fsync":
            unsynced.discard(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        elif (name == "open" and arguments[1] & os.O_CREAT) or name == "mkdir":
            unsynced.add(str(Path(arguments[0]).parent))
        elif name == "link" and Path(arguments[1]).name == "COMMIT":
            assert unsynced - {str(Path(arguments[1]).parent)} == set()  # the draft beside it needs no directory
            unsynced.add(str(Path(arguments[1]).parent))

    with watched(before):
        save(tmp_path, 1, one_piece())
    assert unsynced == set() and "link" in seen

    # The control: with a sync left out, the same check fails.
    with pytest.MonkeyPatch.context() as patch, watched(before):
        for module in (storage, small_files):
            patch.setattr(module, "sync_directory", lambda path: None)
        with pytest.raises(AssertionError):
            save(tmp_path, 2, one_piece())


@pytest.mark.usefixtures("processes")
def test_killed_before_any_operation_on_files(tmp_path: Path) -> None:
    """The old generation or the new one, never a third thing; and the next save clears up and goes on."""
    outcomes: list[float] = []
    finished = False
    while not finished:
        directory = tmp_path / str(len(outcomes))
        save(directory, 1, one_piece(1.0))
        finished = save_and_die(directory, len(outcomes))
        load(directory, target := one_piece(0.0))
        (value,) = target[0].tensor.unique().tolist()
        outcomes.append(value)
        assert not [g for g in scan(FileStorage(directory)) if g.damage]
        clear_leftovers(FileStorage(directory))
        save(directory, 3, one_piece(3.0))
        load(directory, target)
        assert target[0].tensor.unique().tolist() == [3.0]
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes) and set(outcomes) == {1.0, 2.0}


def save_and_die(directory: Path, count: int) -> bool:
    """Save in a process of its own that is gone before operation `count`; whether it came to its end first."""
    child = os.fork()
    if child == 0:
        left = itertools.count(count, -1)
        with contextlib.suppress(BaseException), watched(lambda *_: os._exit(9) if next(left) == 0 else None):
            save(directory, 2, one_piece(2.0))
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


def test_parameters_that_require_gradients_are_saved_and_filled_in_place(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    save(tmp_path, 1, [Piece("model/w", parameter, (0, 0), (3, 4))])
    other = torch.nn.Parameter(torch.zeros(3, 4))
    load(tmp_path, [Piece("model/w", other, (0, 0), (3, 4))])
    assert torch.equal(other, parameter) and other.requires_grad and other.grad_fn is None


REFUSED: dict[str, dict[str, Any]] = {
    "a step that is a float": {"step": 1.0},
    "a step that is a bool": {"step": True},
    "a huge step": {"step": 2**63},
    "a negative incarnation": {"incarnation": -1},
    "a fractional incarnation": {"incarnation": 1.5},
    "a run id that is a number": {"run_id": 5},
    "metrics that are bools": {"metrics": {"loss": True}},
    "metrics that are tensors": {"metrics": {"loss": torch.tensor(1.0)}},
    "metrics that are text": {"metrics": {"loss": "1"}},
    "metrics beyond a float": {"metrics": {"loss": 2**70}},
    "objects that are a list": {"objects": [1, 2]},
    "no budget": {"memory_budget": 0},
    "a list among the pieces": {"pieces": [one_piece()]},
    "an external tensor twice": {"pieces": [External("e", torch.float32, (1,), "", "0" * 64)] * 2},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_not_be_read_again_is_refused_by_all_ranks_before_anything_is_written(what: str) -> None:
    memory = MemoryStorage()

    def try_it(team: Team) -> None:
        options = {"step": 1, "pieces": one_piece(), **(REFUSED[what] if team.rank == 1 else {})}
        save(memory, options.pop("step"), options.pop("pieces"), group=team, **options)

    found = on_ranks(2, try_it)
    assert all(isinstance(error, LayoutError) for error in found), found
    assert memory.list() == {}


def test_pieces_may_come_one_after_the_other(tmp_path: Path) -> None:
    save(tmp_path, 1, (piece for piece in one_piece(3.0)))
    target = one_piece(0.0)
    load(tmp_path, (piece for piece in target))
    assert target[0].tensor.unique().tolist() == [3.0]


def test_ranks_that_check_replicas_apart_are_refused() -> None:
    found = on_ranks(2, lambda t: save(MemoryStorage(), 1, one_piece(), group=t, check_replicas=t.rank == 0))
    assert all("rank 1 saves with check_replicas=False, rank 0 with check_replicas=True" in str(e) for e in found)


def test_a_rank_that_loses_the_others_leaves_what_it_wrote() -> None:
    """Rank 0 may commit it yet; if it does not, it is a leftover."""
    memory = MemoryStorage()

    class Losing(Team):
        def __init__(self) -> None:
            super().__init__()
            self.size = 2

        def _to_first(self, text: str) -> list[str]:
            return [text, text]

        def _from_first(self, text_of: Callable[[int], str]) -> str:
            return text_of(0)

        def _gather(self, text: str) -> list[str]:
            if any("shard" in name for name in memory.list()):
                raise RuntimeError("connection closed by peer")
            return [text, text]

    with pytest.raises(LostError, match="rank 0 cannot reach the others: connection closed by peer"):
        save(memory, 1, one_piece(), group=Losing())
    assert any("shard" in name for name in memory.list())
    assert len(clear_leftovers(memory)) == 1 and memory.list() == {}
