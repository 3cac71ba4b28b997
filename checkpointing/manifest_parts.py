"""A manifest in three parts, for snapshots: its layout is the same from one to the next, and ranks write apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from checkpointing.format import FORMAT, VERSION, Manifest

_OF_LAYOUT = ("tensors", "aliases", "external")
_OF_WRITERS = ("writers",)
_OF_HEAD = tuple(name for name in Manifest.__dataclass_fields__ if name not in (*_OF_LAYOUT, *_OF_WRITERS))


def encode_layout(manifest: Manifest) -> str:
    """The part of a manifest that says what the tensors are, as JSON."""
    whole = asdict(manifest)
    return json.dumps({name: whole[name] for name in _OF_LAYOUT}, separators=(",", ":"))


def head_of(manifest: Manifest) -> dict[str, Any]:
    """The part of a manifest that differs between snapshots of one layout, as JSON values, without the writers."""
    return {"format": FORMAT, "version": VERSION, **{name: getattr(manifest, name) for name in _OF_HEAD}}


def join_manifest(head: Mapping[str, Any], writers: Sequence[Mapping[str, Any]], layout: str) -> bytes:
    """The manifest of these parts; `writers` are records of `Writer`."""
    first = json.dumps({**head, "writers": writers}, separators=(",", ":"), allow_nan=False)
    return f"{first[:-1]},{layout[1:]}".encode()
