"""Saving: any layout, all ranks or none, and nothing exists before COMMIT."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpointing import LayoutError, PeerError, Piece, load, save
from checkpointing.generations import newest, scan
from checkpointing.storage import FileStorage
from tests.checkpointing.layouts_for_tests import assembled, bits, random_layout, random_tensors, same_bits
from tests.threads import all_of, on_ranks


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
    # The comparison can fail: one flipped bit in one tensor is seen.
    victim = next((t for t in tensors if t.value.numel()), None)
    if victim is not None:
        flipped = bytearray(bits(victim.value))
        flipped[-1] ^= 1
        assert bytes(flipped) != bits(loaded[victim.name])


def test_every_byte_of_the_state_is_stored_once(tmp_path: Path) -> None:
    rng = random.Random(1)
    tensors = random_tensors(rng, 8)
    layout = random_layout(rng, tensors, 4, empty=False)
    name = all_of(on_ranks(4, lambda team: save(tmp_path, 1, layout[team.rank], group=team)))[0]
    stored = 0
    for shard in (tmp_path / name).glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            stored += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
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
    assert [g.committed for g in scan(FileStorage(tmp_path)) if g.step == 2] == [False]


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


def test_objects_must_be_finite_json(tmp_path: Path) -> None:
    for bad in ({"x": {1, 2}}, {"x": float("inf")}, {"x": torch.ones(1)}):
        with pytest.raises(LayoutError, match="objects must be plain finite JSON values"):
            save(tmp_path, 1, one_piece(), bad)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_require_gradients_are_saved_and_filled_in_place(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    save(tmp_path, 1, [Piece("model/w", parameter, (0, 0), (3, 4))])
    other = torch.nn.Parameter(torch.zeros(3, 4))
    load(tmp_path, [Piece("model/w", other, (0, 0), (3, 4))])
    assert torch.equal(other, parameter) and other.requires_grad and other.grad_fn is None
