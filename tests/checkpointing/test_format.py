"""The files' encodings: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from checkpointing import CheckpointError, DamagedError, VersionError
from checkpointing.format import (
    DTYPES,
    PACK_BELOW,
    PAGE,
    Index,
    LogicalTensor,
    Manifest,
    StoredBox,
    Writer,
    block_size,
    checksums,
    decode_index,
    decode_manifest,
    encode_index,
    encode_manifest,
    lay_out,
    num_digits,
    panels_of,
    scalar_from_hex,
    scalar_hex,
    stored_panels,
    tensor_bytes,
)
from checkpointing.geometry import Box, intersect

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
    writers=[Writer(0, 4096, 77, "aa", "bb")],
    tensors={"s": LogicalTensor("F32", ()), "w": LogicalTensor("F32", (4, 8))},
)
INDEX = Index(
    MANIFEST.save_id, [StoredBox("w", Box((0, 0), (4, 8)), 0, "0" * 16)], {"s": "00000000"}, {"step": 7, "lr": 0.1}
)


def test_manifest_and_index_are_read_back() -> None:
    assert decode_manifest(encode_manifest(MANIFEST), "m") == MANIFEST
    assert decode_index(encode_index(INDEX, list(MANIFEST.tensors)), MANIFEST, "i") == INDEX


def test_another_version_is_refused_as_such() -> None:
    raw = json.loads(encode_manifest(MANIFEST)) | {"version": 2}
    with pytest.raises(VersionError, match="version 2, and this library reads version 1"):
        decode_manifest(json.dumps(raw).encode(), "m")


def test_an_index_of_another_save_is_refused() -> None:
    other = Index("cd" * 16, INDEX.boxes, INDEX.scalars)
    with pytest.raises(DamagedError, match="belongs to save"):
        decode_index(encode_index(other, list(MANIFEST.tensors)), MANIFEST, "i")


@pytest.mark.parametrize(
    "stored",
    [
        StoredBox("w", Box((1, 0), (4, 8)), 0, "0" * 16),
        StoredBox("w", Box((0, 0), (4, 8)), -1, "0" * 16),
        StoredBox("w", Box((0, 0), (4, 8)), 0, "0" * 15),
        StoredBox("w", Box((0, 0), (4, 8)), 0, "0" * 32),
    ],
)
def test_an_impossible_box_is_refused(stored: StoredBox) -> None:
    index = Index(MANIFEST.save_id, [stored], {})
    with pytest.raises(DamagedError, match="is not an index"):
        decode_index(encode_index(index, list(MANIFEST.tensors)), MANIFEST, "i")


def mutate(data: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    for start, length, replacement in cuts:
        start %= len(data) + 1
        data = data[:start] + replacement + data[start + length :]
    return data


cuts = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)
tokens = st.sampled_from([b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"x"', b"99999999999999999999", b"true"])


@settings(max_examples=300)
@given(cuts | st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 8), tokens), min_size=1, max_size=2))
def test_damaged_text_raises_only_our_errors(changes: list[tuple[int, int, bytes]]) -> None:
    for data, decode in (
        (encode_manifest(MANIFEST), lambda raw: decode_manifest(raw, "m")),
        (encode_index(INDEX, list(MANIFEST.tensors)), lambda raw: decode_index(raw, MANIFEST, "i")),
    ):
        try:
            decode(mutate(data, changes))
        except CheckpointError:
            continue


def test_objects_that_are_not_finite_are_never_written() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode_index(Index("id", [], {}, {"loss": float("nan")}), [])


def test_block_sizes_grow_with_the_box_within_bounds() -> None:
    assert block_size(1) == block_size(64 * PAGE) == PAGE
    assert block_size(64 * PAGE + 1) == 2 * PAGE
    assert block_size(10**9) == 64 * PAGE


@pytest.mark.parametrize("name", list(DTYPES))
def test_bytes_of_every_dtype(name: str) -> None:
    dtype = DTYPES[name]
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    raw = raw % 2 if dtype == torch.bool else raw
    tensor = raw.view(dtype).reshape(2, 3)
    assert bytes(tensor_bytes(tensor)) == bytes(raw.numpy())
    columns = bytes(tensor_bytes(tensor[:, 1:]))  # not contiguous
    assert columns == bytes(tensor_bytes(tensor[:, 1:].clone()))
    scalar = tensor[1, 2]
    back = scalar_from_hex(scalar_hex(scalar), dtype, "s")
    assert bytes(tensor_bytes(back.reshape(1))) == bytes(tensor_bytes(scalar.reshape(1)))


@pytest.mark.parametrize("text", ["", "00", "zz000000", "0000000000"])
def test_a_scalar_of_the_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(DamagedError, match="is not a scalar"):
        scalar_from_hex(text, torch.float32, "s")


def test_shard_header_is_plain_safetensors(tmp_path: Path) -> None:
    tensors = {"a": LogicalTensor("BF16", (512, 128)), "b": LogicalTensor("F32", (5,)), "c": LogicalTensor("F32", (3,))}
    large = Box((0, 0), (512, 128))
    boxes = [("a", large), ("b", Box((0,), (5,))), ("c", Box((1,), (2,)))]
    header, placed = lay_out(boxes, tensors, "ab" * 16)
    assert len(header) == PAGE
    assert [(p.name, p.start) for p in placed] == [("b", 0), ("c", 20), ("a", 28)]
    file = tmp_path / "shard.safetensors"
    file.write_bytes(header + bytes(28 + 512 * 128 * 2))
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["save_id"] == "ab" * 16
        assert set(opened.keys()) == {"@packed-F32", *(f"a@0,{8 * n}" for n in range(16))}
        assert opened.get_tensor("@packed-F32").shape == (7,)
        assert opened.get_tensor("a@0,16").shape == (512, 8)


@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_panels_share_out_the_bytes_and_checksums_of_their_box(rows: int, columns: int, data: st.DataObject) -> None:
    tensor = LogicalTensor("F64", (rows, columns))
    left = data.draw(st.integers(0, columns - 1))
    box = Box((0, left), (rows, data.draw(st.integers(1, columns - left))))
    cut = [num_digits(panel.numel * 8) for panel in panels_of(box, tensor)]
    stored = StoredBox("w", box, 40, "".join(format(n % 16, "x") * digits for n, digits in enumerate(cut)))
    index = Index(MANIFEST.save_id, [stored], {})
    manifest = replace(MANIFEST, tensors={"w": tensor})
    decode_index(encode_index(index, ["w"]), manifest, "i")  # as strict as it is, it accepts that
    parts = list(stored_panels(stored, tensor))
    assert "".join(part.checksums for part in parts) == stored.checksums
    assert [part.start for part in parts] == [40 + sum(p.box.numel * 8 for p in parts[:n]) for n in range(len(parts))]
    assert sum(part.box.numel for part in parts) == box.numel
    assert all(len(set(part.checksums)) == 1 for part in parts)
    wanted = Box((0, data.draw(st.integers(0, columns - 1))), (rows, 1))
    met = list(stored_panels(stored, tensor, wanted))
    assert met == [part for part in parts if intersect(part.box, wanted)]
    if box.numel * 8 >= PACK_BELOW:
        with pytest.raises(DamagedError, match="checksums for another size"):
            decode_index(
                encode_index(replace(index, boxes=[replace(stored, checksums="0" * 16)]), ["w"]), manifest, "i"
            )


def test_checksums_follow_the_blocks() -> None:
    data = memoryview(bytes(range(256)) * 40)
    sums = checksums(data, PAGE)
    assert len(sums) == 16 * 3
    changed = bytearray(data)
    changed[PAGE] ^= 1
    differing = [
        i for i in range(3) if sums[16 * i : 16 * i + 16] != checksums(memoryview(changed), PAGE)[16 * i :][:16]
    ]
    assert differing == [1]


@pytest.mark.parametrize("value", ['"1"', "null", "true", "[1]"])
def test_metrics_that_are_no_numbers_are_refused(value: str) -> None:
    text = encode_manifest(MANIFEST).replace(b'"loss":0.5', f'"loss":{value}'.encode())
    with pytest.raises(DamagedError, match="is not a finite number"):
        decode_manifest(text, "m")
