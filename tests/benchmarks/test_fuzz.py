"""The campaign against the parsers: its beginning, how much of them it reaches, and that it can find something."""

from __future__ import annotations

import logging
import random

import pytest

from benchmarks.fuzz import Found, campaign, changed, covered, planted, use, valid
from checkpointing import codec


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="checkpointing")


@pytest.mark.usefixtures("long")
def test_hostile_checkpoints_reaches_the_whole_parser() -> None:
    counts = {}
    part = covered(lambda: counts.update(campaign(120, seed=11, most=1000)))
    assert part >= 0.95
    assert counts["cases"] > counts["loaded"] > 0  # some changes are harmless, and most are not
    more = campaign(10, seed=12)
    assert more["cases"] > more["loaded"] > 0


def test_a_check_that_is_missing_is_found() -> None:
    with pytest.raises(Found, match=r"case \d+ of seed 0: IndexError"), planted():
        campaign(120, seed=0, most=20_000)
    assert campaign(120, seed=0, most=50)["cases"] == 50  # it is back in its place


def test_what_hangs_or_takes_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.fuzz.CASE_S", 1)

    def hang(*_: object) -> None:
        while True:
            pass

    def swallow(*_: object) -> None:
        raise MemoryError

    original = valid()
    monkeypatch.setattr("benchmarks.fuzz.valid", lambda: original)
    monkeypatch.setattr("benchmarks.fuzz.use", lambda files, first: files is first or use(files, first))
    for bad, error in ((hang, "TimeoutError"), (swallow, "MemoryError")):
        with monkeypatch.context() as patch:
            patch.setattr(codec, "_decode_boxes", bad)
            with pytest.raises(Found, match=error):
                campaign(60, seed=0, most=5)


def test_changes_are_repeatable_and_believed() -> None:
    original = valid()
    assert changed(original, random.Random(5)) == changed(original, random.Random(5))
    assert use(original, original)
