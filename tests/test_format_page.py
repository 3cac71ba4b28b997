"""docs/format.md: its example is a checkpoint that this library reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import xxhash

from checkpointing import External, Piece, load
from checkpointing.codec import decode_index, decode_manifest
from checkpointing.format import PAGE, digest
from tests.harness.processes import ROOT


def test_the_example_can_be_loaded(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    manifest, index, header = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    raw = {name: json.dumps(value, separators=(",", ":")).encode() for name, value in (("i", index), ("h", header))}
    parsed = decode_manifest(json.dumps(manifest).encode(), "the page")
    decode_index(raw["i"], parsed, "the page")
    shard = (PAGE - 8).to_bytes(8, "little") + raw["h"].ljust(PAGE - 8)
    # The digests on the page are those of the very bytes it describes.
    assert (digest(raw["i"]), digest(shard)) == (parsed.writers[0].index, parsed.writers[0].header)
    directory = tmp_path / parsed.generation
    directory.mkdir()
    data = torch.tensor([1, 1, 0, 1, 2, 3, 4, 5], dtype=torch.float32)
    sums = b"".join(xxhash.xxh3_64_digest(data[of].numpy().tobytes()) for of in (slice(2), slice(2, 8)))
    assert digest(sums) == index["checksums"]
    (directory / "shard-00000.safetensors").write_bytes(shard + data.numpy().tobytes() + sums)
    (directory / "index-00000.json").write_bytes(raw["i"])
    text = json.dumps(manifest).encode()
    (directory / "manifest.json").write_bytes(text)
    (directory / "COMMIT").write_text(digest(text))
    w, b, step = torch.zeros(2, 3), torch.zeros(2), torch.tensor(0.0)
    pieces = [Piece("model/z", w, (0, 0), (2, 3)), Piece("model/b", b, (0,), (2,)), Piece("optim/w/step", step, (), ())]
    base = External("model/base", torch.bfloat16, (4, 4), "elsewhere", "5e" * 32)
    assert load(tmp_path, [*pieces, base]) == {"cursor": 30}
    assert w.tolist() == [[0, 1, 2], [3, 4, 5]] and b.tolist() == [1, 1] and step.item() == 30
