"""What methods say of themselves by their options, and which of a method's options mean nothing together."""

from __future__ import annotations

import pytest

from trainer.compose import compose
from trainer.errors import Refused


def test_which_methods_bring_an_optimizer_or_look_at_gradients() -> None:
    told = {
        name: (one.trains_entries, one.brings_optimizer, one.reads_gradients)
        for name in ("full", "lora", "perp_selective", "s2ft", "lift", "lt_sft", "spt", "spiel_ma")
        if (one := compose([f"method={name}"]).method)
    }
    assert told == {
        **dict.fromkeys(("full", "lora", "perp_selective"), (False, False, False)),
        "s2ft": (True, False, False),
        "lift": (True, True, False),
        "lt_sft": (True, False, True),
        "spt": (True, False, True),
        "spiel_ma": (True, True, False),
    }


def test_growth_by_gradients_is_told_from_other_growth() -> None:
    assert compose(["method=spiel"]).method.grows_by_parts and not compose(["method=spiel_ma"]).method.grows_by_parts
    assert not compose(["method=full"]).method.grows_by_parts


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["method.selector=delta"], "the difference of a full phase is there after one"),
        (["method=lt_sft", "method.selector=random"], "is there after one"),
        (["method=s2ft", "method.schedule=renew", "method.every=5"], "whole channels are selected once"),
        (["method.allocator=threshold"], "is of the smallest weights"),
        (["method=sara", "method.granularity=inputs", "method.schedule=once"], "is of single weights"),
        (["method.schedule=narrow"], "goes on below a threshold"),
        (["method=lift", "method.selector=gradient"], "is of the start"),
        (["method=lift", "method.every=0"], "needs method.every=STEPS"),
        (["method=spiel", "method.every=5"], r"Type method\.every=6 or more"),
        (["method=lift", "method.promote_rank=4"], r"Type method\.promote_rank=0"),
        (["method=s2ft", "method.nuclear=0.1"], r"Type method\.nuclear=0"),
        (["method=lt_sft", "method.bf16_weights=true"], r"Type method\.bf16_weights=false"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(Refused, match=why):
        compose(overrides if overrides[0].startswith("method=") else ["method=sparse", *overrides])
