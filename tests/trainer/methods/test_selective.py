"""Some parameters as they are, everything else frozen."""

from __future__ import annotations

import pytest

from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods import build


def test_norms_and_the_head_train_and_nothing_else() -> None:
    made = build(compose(["method=perp_selective"]), "meta")
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert "lm_head.weight" in trained and "model.norm.weight" in trained
    assert all("norm" in name or "lm_head" in name for name in trained) and len(trained) == 10


def test_patterns_that_are_none_or_match_nothing_are_refused() -> None:
    with pytest.raises(Refused, match="is found in no name of a parameter, such as model"):
        build(compose(["method=selective", "method.parameters=[nowhere]"]), "meta")
    with pytest.raises(Refused, match=r"Type patterns such as \[norm,bias\]"):
        build(compose(["method=selective", "method.parameters=['(']"]), "meta")
