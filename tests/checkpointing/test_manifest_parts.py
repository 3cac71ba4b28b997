"""The parts of a manifest, put together, are the manifest."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from checkpointing.codec import decode_manifest
from checkpointing.errors import DamagedError
from checkpointing.format import LogicalTensor, Manifest, Writer
from checkpointing.manifest_parts import encode_layout, head_of, join_manifest

WRITER = Writer(0, 4096, 10, "a" * 32, "b" * 32, ((0, 65536),))
TENSORS = {"model/w": LogicalTensor("F32", (2, 3), (0,))}
MANIFEST = Manifest(3, "c" * 32, "", "r", 1, 2, 1.5, 1, {"torch": "2"}, {"loss": 1.0}, [WRITER], TENSORS)


def test_put_together_they_are_the_manifest() -> None:
    data = join_manifest(head_of(MANIFEST), [asdict(WRITER)], encode_layout(MANIFEST))
    assert decode_manifest(data, "manifest.json") == MANIFEST


def test_without_one_of_them_it_is_none() -> None:
    for data in (
        join_manifest(head_of(MANIFEST), [], encode_layout(MANIFEST)),
        join_manifest({}, [asdict(WRITER)], encode_layout(MANIFEST)),
        join_manifest(head_of(MANIFEST), [asdict(WRITER)], '{"tensors":{}}'),
    ):
        with pytest.raises(DamagedError):
            decode_manifest(data, "manifest.json")
