"""What torch.save wrote is read as torch reads it, and nothing of it runs."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from checkpointing import CheckpointError, DamagedError
from checkpointing.foreign import archive
from checkpointing.foreign.archive import Inert, Mapped, read_archive, read_pickle

BASE = torch.arange(24, dtype=torch.float32)
WRITTEN: dict[str, Any] = {
    "whole": BASE.reshape(4, 6),
    "transposed": BASE.reshape(4, 6).t(),
    "part": BASE[5:9],
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "parameter": nn.Parameter(torch.ones(3)),
    "others": [
        torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)
    ],
    "fp8": torch.ones(2).to(torch.float8_e4m3fn),
    "plain": {"a": (1, 2.5, None, "b"), 3: [True]},
    "ordered": OrderedDict(x=torch.Size([2, 3])),
    "dtype": torch.bfloat16,
}


def assert_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(
            found.view(torch.uint8) if found.dtype.itemsize == 1 else found,
            expected.detach().view(torch.uint8) if found.dtype.itemsize == 1 else expected.detach(),
        )
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("before", [0, 1, 64])
def test_it_reads_what_torch_reads(tmp_path: Path, before: int) -> None:
    """Also from the middle of a file, where tensors may lie at any byte."""
    held = io.BytesIO()
    torch.save(WRITTEN, held)
    path = tmp_path / "file"
    path.write_bytes(b"x" * before + held.getvalue() + b"y" * 100)
    found = read_archive(Mapped.of(path), before, len(held.getvalue()))
    assert_alike(found, WRITTEN)
    # Nothing was copied: each lies in the file's memory.
    mapped = Mapped.of(path)
    start = torch.frombuffer(mapped.data, dtype=torch.uint8).data_ptr()
    for tensor in read_archive(mapped, before, len(held.getvalue())).values():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            assert start <= tensor.data_ptr() < start + len(mapped.data)
    found["whole"].zero_()  # copy-on-write
    assert_alike(read_archive(Mapped.of(path), before, len(held.getvalue())), WRITTEN)


class Trap:
    """What an ordinary reader would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Settings:
    """An object of a class that only its writer has."""

    def __init__(self) -> None:
        self.stage = 2


def test_nothing_runs(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "file"
    state = {"w": torch.ones(2), "trap": Trap(marker), "settings": Settings(), "counts": defaultdict(int, a=1)}
    torch.save(state, path)
    found = read_archive(Mapped.of(path))
    assert not marker.exists() and torch.equal(found["w"], torch.ones(2))
    assert isinstance(found["trap"], Inert) and found["trap"].arguments == (str(marker),)
    assert found["settings"].stage == 2 and isinstance(found["counts"], Inert)
    (tmp_path / "pickle").write_bytes(pickle.dumps([Trap(marker), Settings()]))
    assert isinstance(read_pickle(tmp_path / "pickle")[0], Inert) and not marker.exists()
    torch.load(path, weights_only=False)  # the control: the trap works
    assert marker.exists()


def test_state_is_given_to_inert_objects_alone(tmp_path: Path) -> None:
    """By BUILD, which calls `__setstate__` or sets attributes, of tensors and of this module's functions too."""
    path = tmp_path / "pickle"
    before = dict(archive._tensor.__dict__), archive._tensor.__defaults__
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"):
        path.write_bytes(b"\x80\x02" + target + b"N}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.")
        with pytest.raises(DamagedError, match="with a state of its own"):
            read_pickle(path)
    assert (dict(archive._tensor.__dict__), archive._tensor.__defaults__) == before
    path.write_bytes(pickle.dumps(Settings()))
    assert read_pickle(path).stage == 2
    torch.save({"w": torch.ones(1).expand(10**6)}, path)  # one number that is said to be a million
    with pytest.raises(DamagedError, match="the same ones again and again"):
        read_archive(Mapped.of(path))


def overlapping(count: int) -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(2 * count).as_strided((count, count), (1, 1))}


def shared(count: int) -> dict[str, torch.Tensor]:
    base = torch.zeros(1000)
    return {f"w{n}": base[: 1000 - n % 2] for n in range(count)}


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (overlapping(500), "the same ones again and again"),
        ({"w": torch.zeros(40).as_strided((3, 4, 5), (7, 2, 1))}, "the same ones again and again"),
        (shared(200), "of more bytes than the file has"),
    ],
    ids=["rows that overlap", "one dimension within another", "one storage for many"],
)
def test_a_small_file_does_not_become_a_large_one(tensors: dict[str, torch.Tensor], why: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "file")
    with pytest.raises(DamagedError, match=why):
        read_archive(Mapped.of(tmp_path / "file"))


def test_tied_tensors_and_strides_without_overlap_are_read(tmp_path: Path) -> None:
    tied = torch.ones(300)
    every = torch.arange(64.0)
    given = {
        "a": tied,
        "b": tied,
        "every other": every[::2],
        "columns": every.reshape(8, 8)[:, 2:4],
        "turned": every.reshape(2, 4, 8).permute(2, 0, 1),
        "one": every[:1].as_strided((1, 5), (0, 1)),
    }
    torch.save(given, tmp_path / "file")
    assert_alike(read_archive(Mapped.of(tmp_path / "file")), given)


def test_what_would_unfold_is_not_unfolded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file") as plain, zipfile.ZipFile(tmp_path / "bomb", "w") as bomb:
        for name in plain.namelist():
            pressed = zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
            bomb.writestr(name, plain.read(name) + bytes(10_000_000 if name.endswith("data.pkl") else 0), pressed)
    with pytest.raises(DamagedError, match=r"is compressed, which torch\.save never does"):
        read_archive(Mapped.of(tmp_path / "bomb"))
    (tmp_path / "pickle").write_bytes(pickle.dumps(list(range(1000))))
    monkeypatch.setattr(archive, "PICKLE_BYTES", 100)
    for read in (lambda: read_archive(Mapped.of(tmp_path / "file")), lambda: read_pickle(tmp_path / "pickle")):
        with pytest.raises(DamagedError, match="at most 100 are read"):
            read()


def test_what_it_is_not_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"text", b"PK\x05\x06" + b"\0" * 18):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="file"):
            read_archive(Mapped.of(path))
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(DamagedError, match="ends before byte"):
        read_archive(Mapped.of(path), 10, 10**6)
    path.write_bytes(pickle.dumps({"a": 1})[:-2])
    with pytest.raises(DamagedError, match="is damaged"):
        read_pickle(path)


SAVED = io.BytesIO()
torch.save({"w": BASE.reshape(4, 6), "n": nn.Parameter(torch.ones(3)), "s": Settings()}, SAVED)


@given(st.integers(0, len(SAVED.getvalue()) - 1), st.integers(0, 255), st.integers(0, len(SAVED.getvalue())))
def test_bytes_that_anybody_wrote(tmp_path_factory: pytest.TempPathFactory, at: int, value: int, kept: int) -> None:
    """Either it reads something, or it says that it cannot."""
    data = bytearray(SAVED.getvalue())
    data[at] = value
    path = tmp_path_factory.mktemp("fuzz") / "file"
    for content in (bytes(data), bytes(data[:kept])):
        path.write_bytes(content)
        try:
            read_archive(Mapped.of(path))
        except CheckpointError as error:
            assert "file" in str(error)
