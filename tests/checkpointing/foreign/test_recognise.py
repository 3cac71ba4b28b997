"""Which library wrote a directory, and whether its pickles may be read."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpointing import CheckpointError, LayoutError, MismatchError, NotFoundError
from checkpointing.foreign import describe_foreign
from tests.harness.models import save_tiny_model


def test_each_is_recognised(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "hf")
    dcp.save({"w": torch.zeros(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert describe_foreign(tmp_path / "hf").kind.startswith("Hugging Face directory")
    assert describe_foreign(tmp_path / "dcp", trust_pickle=True).kind.startswith("torch.distributed.checkpoint")
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "layer_0_expert_0_mp_rank_00_model_states.pt").write_bytes(b"")
    torch.save({"module": {"w": torch.ones(2)}, "global_steps": 5}, tmp_path / "ds" / "mp_rank_00_model_states.pt")
    with pytest.raises(MismatchError, match="holds experts"):
        describe_foreign(tmp_path / "ds", trust_pickle=True)
    (tmp_path / "ds" / "layer_0_expert_0_mp_rank_00_model_states.pt").unlink()
    found = describe_foreign(tmp_path / "ds", trust_pickle=True)
    assert (found.kind, found.step) == ("DeepSpeed ZeRO stage 0, 1 rank", 5)
    for kind, who in (("dcp", r"torch\.distributed\.checkpoint"), ("ds", "DeepSpeed")):
        with pytest.raises(LayoutError, match=f"was written by {who}.*type --trust-pickle"):
            describe_foreign(tmp_path / kind)


def written(directory: Path) -> list[Path]:
    """A small checkpoint of each library."""
    save_tiny_model(directory / "hf")
    model = torch.nn.Linear(3, 2)
    dcp.save({"model": model.state_dict()}, checkpoint_id=directory / "dcp", no_dist=True)
    (directory / "ds").mkdir()
    torch.save({"module": model.state_dict(), "global_steps": 5}, directory / "ds" / "mp_rank_00_model_states.pt")
    torch.save({"w": torch.ones(2)}, directory / "bin")
    (directory / "torch").mkdir()
    (directory / "bin").rename(directory / "torch" / "pytorch_model.bin")
    return [directory / kind for kind in ("hf", "dcp", "ds", "torch")]


@pytest.mark.usefixtures("long")
def test_whatever_the_bytes_a_directory_is_described_or_refused(tmp_path: Path) -> None:
    """Damage anywhere is an error of ours or of the system, and never another one, nor a hang."""
    draws, outcomes = random.Random(5), Counter[str]()
    for directory in written(tmp_path):
        assert describe_foreign(directory, trust_pickle=True).pieces
        files = sorted(path for path in directory.iterdir() if path.suffix not in (".jinja", ".txt"))
        for _ in range(120):
            file = draws.choice(files)
            whole = file.read_bytes()
            file.write_bytes(damaged(whole, draws))
            try:
                for piece in describe_foreign(directory, trust_pickle=True).pieces:
                    piece.tensor.sum()
                outcomes["read"] += 1
            except (CheckpointError, OSError) as error:
                outcomes[type(error).__name__] += 1
            file.write_bytes(whole)
        assert describe_foreign(directory, trust_pickle=True).pieces
    assert outcomes["read"] > 50 and outcomes["DamagedError"] > 50, outcomes


def damaged(data: bytes, draws: random.Random) -> bytes:
    """Cut off, with bytes changed, or with a range moved elsewhere."""
    how, at = draws.randrange(4), draws.randrange(max(1, len(data)))
    if how == 0:
        return data[:at]
    if how == 1:
        other = draws.randrange(max(1, len(data)))
        return data[:at] + data[other : other + 40] + data[at + 40 :]
    changed = bytearray(data)
    for _ in range(how * how):
        if changed:
            place = draws.randrange(min(len(changed), 600)) if how == 3 else draws.randrange(len(changed))
            changed[place] = draws.randrange(256)
    return bytes(changed)


def test_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not a directory"):
        describe_foreign(tmp_path / "none")
    with pytest.raises(NotFoundError, match="holds no checkpoint that is known here"):
        describe_foreign(tmp_path)
