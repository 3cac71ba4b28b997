"""Which library wrote a directory, and whether its pickles may be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpointing import LayoutError, MismatchError, NotFoundError
from checkpointing.foreign import describe_foreign
from tests.models import save_tiny_model


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


def test_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not a directory"):
        describe_foreign(tmp_path / "none")
    with pytest.raises(NotFoundError, match="holds no checkpoint that is known here"):
        describe_foreign(tmp_path)
