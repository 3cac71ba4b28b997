"""The comparison of before and after: nothing differs where nothing has changed, and what has is named."""

from __future__ import annotations

from pathlib import Path

from tests.harness.engines import contents_differ
from tests.harness.unchanged import differences, overrides_of, trace, traces
from tests.harness.worlds import SharedWorld

PAIR = "regrow, ddp"


def test_the_same_code_computes_the_same_and_other_code_does_not(world: SharedWorld, tmp_path: Path) -> None:
    before, after, other = tmp_path / "before", tmp_path / "after", tmp_path / "other"
    recorded = traces(world, ["ddp"], ["regrow"], before)[PAIR]
    now = traces(world, ["ddp"], ["regrow"], after, before)[PAIR]
    assert len(now) == 4 and differences(recorded, now) == []
    assert contents_differ(before / PAIR, after / PAIR) == []
    # The control: an optimizer that decays, where the recorded one did not.
    decaying = [*overrides_of("regrow", "ddp"), "optimizer.weight_decay=0.9"]
    changed = world.run(trace, 2, decaying, other / PAIR, before / PAIR)[0]
    assert len(differences(recorded, changed)) == 4
    assert contents_differ(before / PAIR, other / PAIR)
