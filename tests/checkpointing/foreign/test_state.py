"""Names without those of wrappers, and tied tensors under all their names."""

from __future__ import annotations

import torch

from checkpointing import Piece
from checkpointing.foreign.state import Foreign, as_buffers_too, bare, under_all_names


def test_names_lose_wrappers() -> None:
    wrapped = ["module.a.weight", "module.b._checkpoint_wrapped_module.weight"]
    assert [bare(name, wrapped) for name in wrapped] == ["a.weight", "b.weight"]
    # A child may be called `module`, where others are not.
    assert bare("module.a", ["module.a", "head"]) == "module.a"
    assert bare("module.enc.module.w", ["module.enc.module.w"]) == "enc.module.w"
    assert bare("_orig_mod.a", ["_orig_mod.a", "_orig_mod.b"]) == "a"


def test_tied_ones_have_both_names() -> None:
    memory = torch.ones(2)
    pieces = [Piece("model/a", memory, (0,), (2,)), Piece("optim/a/step", torch.ones(()), (), ())]
    found = under_all_names(pieces, {"b": "a", "c": "elsewhere"})
    assert [piece.name for piece in found] == ["model/a", "optim/a/step", "model/b", "optim/b/step"]
    assert found[2].memory == found[0].memory
    assert Foreign("", 1, found).has_optimizer and not Foreign("", 1, found[:1]).has_optimizer


def test_what_has_no_moments_may_be_a_buffer() -> None:
    one = torch.ones(())
    pieces = [
        Piece("model/a", one, (), ()),
        Piece("model/b", torch.ones(()), (), ()),
        Piece("optim/a/step", one, (), ()),
    ]
    assert [piece.name for piece in as_buffers_too(pieces)][3:] == ["buffer/b"]
