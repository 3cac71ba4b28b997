"""Which changes of settings leave the result as it was."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.allowed_changes import check_state
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods import build
from trainer.models import architecture
from trainer.options.stored import as_json


def changed(was: list[str], now: list[str]) -> dict[str, tuple[Any, Any]]:
    """What has changed from one configuration to another, of the same data."""
    config = compose(now)
    model = build(config, "meta")
    state = {"config": as_json(compose(was)), "fingerprint": "f", "architecture": architecture(model)}
    return check_state(config, state, "f", model)


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["data=stdlib"], True),
        (["data=text", "data.path=x"], True),
        (["data=stdlib", "data.pack=true"], False),
        (["data=jsonl", "data.path=x"], False),
        (["data=chat", "data.path=x"], False),
        (["data=hf", "data.path=x"], False),
        (["data=mix"], False),
    ],
)
def test_another_pipeline_draws_other_dropout_where_rows_differ_in_width(words: list[str], allowed: bool) -> None:
    was, now = (compose([*words, "model.dropout=0.1", f"parallel.pp={pp}"]) for pp in (2, 1))
    model = build(now, "meta")
    state = {"config": as_json(was), "fingerprint": "f", "architecture": architecture(model)}
    if allowed:
        assert set(check_state(now, state, "f", model)) == {"parallel.pp"}
    else:
        with pytest.raises(Refused, match=r"parallel\.pp \(dropout is drawn for the width"):
            check_state(now, state, "f", model)


def test_what_is_free_is_told_and_what_is_not_is_refused_by_its_name() -> None:
    assert changed([], []) == {}
    assert changed(["parallel=ddp"], ["parallel=ddp", "parallel.tp=2"]) == {"parallel.tp": (1, 2)}
    assert changed(["train.steps=4"], ["train.steps=9"]) == {"train.steps": (4, 9)}
    for was, now, key in (
        (["train.steps=9"], ["train.steps=4"], r"train\.steps \(was 9, is 4\)"),
        (["train.seed=1"], ["train.seed=2"], r"train\.seed \(was 1, is 2\)"),
    ):
        with pytest.raises(Refused, match=key):
            changed(was, now)
    assert "train.seed" in changed(["train.seed=1"], ["train.seed=2", "resume_allow=[train.seed]"])
    with pytest.raises(Refused, match="whose moments cannot be loaded"):  # whatever is allowed
        changed(["optimizer=adamw_8bit"], ["resume_allow=[optimizer]"])
