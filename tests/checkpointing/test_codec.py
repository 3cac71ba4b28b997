"""Manifests and indexes: what is written is read back, and of everything else only our errors come."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from checkpointing import DamagedError, VersionError
from checkpointing.codec import decode_index, decode_manifest, encode_index, encode_manifest
from checkpointing.format import ExternalTensor, Index, LogicalTensor, Manifest, StoredBox, Writer
from checkpointing.geometry import Box

MANIFEST = Manifest(
    step=7,
    save_id="ab" * 16,
    parent="",
    run_id="r",
    incarnation=2,
    serial=3,
    created=1.5,
    world_size=2,
    versions={"torch": "2"},
    metrics={"loss": 0.5},
    writers=[Writer(0, 4096, 77, "aa" * 16, "bb" * 16), Writer(1, 4096, 77, "aa" * 16, "bb" * 16, ((0, 8), (0, 9)))],
    tensors={
        "s": LogicalTensor("F32", (), (0,)),
        "v": LogicalTensor("F8_E4M3", (3,)),
        "w": LogicalTensor("F32", (4, 8), (0, 1)),
    },
    aliases={"tied": "w"},
    external={"base": ExternalTensor("BF16", (2, 2), "a hub id", "cd" * 32)},
)
INDEX = Index(
    MANIFEST.save_id,
    [StoredBox("w", Box((0, 0), (2, 8)), 0, 0), StoredBox("w", Box((2, 0), (2, 8)), 64, 8)],
    "ef" * 16,
    {"s": "00000000"},
    {"step": 7, "lr": 0.1},
)


def test_manifest_and_index_are_read_back() -> None:
    again = decode_manifest(encode_manifest(MANIFEST), "m")
    assert again == MANIFEST
    assert [t.writers for t in again.tensors.values()] == [(0,), None, (0, 1)]  # which equality leaves out
    assert decode_index(encode_index(INDEX, MANIFEST.tensors), MANIFEST, "i") == INDEX


@pytest.mark.parametrize("version", [2, 0, "1", True, 1.0, None])
def test_another_version_is_refused_as_such(version: object) -> None:
    raw = json.loads(encode_manifest(MANIFEST)) | {"version": version}
    with pytest.raises(VersionError, match="and this library reads version 1"):
        decode_manifest(json.dumps(raw).encode(), "m")


def test_an_index_of_another_save_is_refused() -> None:
    other = replace(INDEX, save_id="cd" * 16)
    with pytest.raises(DamagedError, match="belongs to save"):
        decode_index(encode_index(other, MANIFEST.tensors), MANIFEST, "i")


def test_objects_that_are_not_finite_are_never_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_index(replace(INDEX, objects={"loss": float("nan")}), MANIFEST.tensors)


HUGE, NEGATIVE = 2**63, -1
# Where in the document, and what is put there. Each must be refused by itself.
MANIFEST_CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("step",), NEGATIVE),
    (("step",), 1.0),
    (("step",), True),
    (("step",), HUGE),
    (("save_id",), "../../../../etc/passwd-0123456789"),
    (("save_id",), "AB" * 16),
    (("parent",), None),
    (("created",), "now"),
    (("created",), 10**400),
    (("metrics",), {"loss": "1"}),
    (("metrics",), {"loss": None}),
    (("metrics",), {"loss": True}),
    (("versions",), {"torch": 2}),
    (("versions",), []),
    (("writers",), []),
    (("writers",), {}),
    (("writers", 0, "rank"), 1),
    (("writers", 1, "rank"), 2),
    (("writers", 1, "rank"), "../1"),
    (("writers", 0, "rank"), NEGATIVE),
    (("writers", 0, "shard_bytes"), HUGE),
    (("writers", 0, "header"), "zz" * 16),
    (("writers", 0, "index"), None),
    (("writers", 0, "cover"), [[1]]),
    (("writers", 0, "cover"), [[1, -2]]),
    (("writers", 0, "more"), 1),
    (("tensors", "w", "dtype"), "F31"),
    (("tensors", "w", "dtype"), 5),
    (("tensors", "w", "shape"), [4, -8]),
    (("tensors", "w", "shape"), [2**40, 2**40]),
    (("tensors", "w", "shape"), [0, 2**62]),
    (("tensors", "w", "shape"), [1] * 65),
    (("tensors", "w", "shape"), "48"),
    (("tensors", "w", "writers"), [7]),
    (("tensors", "w", "writers"), ["0"]),
    (("tensors", ""), {"dtype": "F32", "shape": [], "writers": None}),
    (("tensors", "a\nb"), {"dtype": "F32", "shape": [], "writers": None}),
    (("tensors", "tied"), {"dtype": "F32", "shape": [], "writers": None}),
    (("aliases", "other"), "nothing"),
    (("aliases", "w"), "v"),
    (("aliases", "base"), "w"),
    (("external", "base", "sha256"), "cd"),
    (("external", "base", "source"), None),
    (("external", "w"), {"dtype": "F32", "shape": [], "source": "", "sha256": "cd" * 32}),
    (("more",), 1),
]
INDEX_CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("boxes",), []),
    (("boxes", "tensor"), [2]),  # the columns are of different lengths
    (("boxes", "tensor", 0), 3),
    (("boxes", "tensor", 0), -1),
    (("boxes", "tensor", 0), 0),  # a scalar has no box
    (("boxes", "range", 0), 2),
    (("boxes", "range", 0), -1),
    (("ranges", 0, 0), [3, 0]),
    (("ranges", 0, 0), [0]),
    (("ranges", 0, 0), [0, "0"]),
    (("ranges", 0, 1), [0, 8]),
    (("ranges", 0, 1), [HUGE, 8]),
    (("ranges", 0), [[0, 0]]),
    (("ranges", 0), {}),
    (("checksums",), "ef"),
    (("checksums",), None),
    (("boxes", "more"), [1, 2]),
    (("scalars", "s"), "00"),
    (("scalars", "s"), "zz000000"),
    (("scalars", "s"), 0),
    (("scalars", "w"), "00000000"),
    (("scalars", "unknown"), "00000000"),
    (("objects",), [1]),
    (("save_id",), None),
]


def changed(data: bytes, path: tuple[Any, ...], value: Any) -> bytes:
    document = json.loads(data)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(("path", "value"), MANIFEST_CHANGES, ids=str)
def test_what_a_manifest_may_not_say_is_refused(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(DamagedError, match="m is not a manifest"):
        decode_manifest(changed(encode_manifest(MANIFEST), path, value), "m")


@pytest.mark.parametrize(("path", "value"), INDEX_CHANGES, ids=str)
def test_what_an_index_may_not_say_is_refused(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(DamagedError, match=r"i (is not an index|belongs to save)"):
        decode_index(changed(encode_index(INDEX, MANIFEST.tensors), path, value), MANIFEST, "i")


@pytest.mark.parametrize("key", [*asdict(MANIFEST), "version", "format"])
def test_every_key_is_needed(key: str) -> None:
    raw = json.loads(encode_manifest(MANIFEST))
    del raw[key]
    with pytest.raises((DamagedError, VersionError)):
        decode_manifest(json.dumps(raw).encode(), "m")


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "a key twice": lambda text: text.replace(b'"step":7', b'"step":7,"step":8'),
    "a tensor twice": lambda text: text.replace(b'"v":', b'"w":'),
    "not a number": lambda text: text.replace(b"0.5", b"NaN"),
    "infinity": lambda text: text.replace(b"0.5", b"1e999"),
    "too deep": lambda text: b"[" * 100_000,
    "too many digits": lambda text: text.replace(b'"step":7', b'"step":' + b"7" * 5000),
    "cut": lambda text: text[:-1],
    "no text": lambda text: b"\xff\xfe" + text,
    "no object": lambda text: b"[]",
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_strict_json_is_refused(name: str) -> None:
    with pytest.raises(DamagedError):
        decode_manifest(TEXTS[name](encode_manifest(MANIFEST)), "m")
