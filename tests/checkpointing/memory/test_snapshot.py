"""A snapshot on its way: the first reason for which it failed stays, and what was copied can be compared."""

from __future__ import annotations

from typing import Any

import pytest

from checkpointing.collective import Team
from checkpointing.memory.image import Image, copy_part
from checkpointing.memory.snapshot import Snapshot
from checkpointing.plan import layout_rows
from checkpointing.planner import agree_on_plan
from tests.checkpointing.memory.test_snapshotter import rows_of


@pytest.fixture
def snapshot() -> Snapshot:
    pieces = rows_of(0, 1, 1)
    image = Image(agree_on_plan(Team(), layout_rows(pieces)), pieces, 0)
    nothing: Any = None
    return Snapshot(1, 1, pieces, image, nothing, {}, False, 0, True)


def test_the_first_reason_stays_and_nobody_waits_any_more(snapshot: Snapshot) -> None:
    snapshot.fail("first")
    snapshot.fail("second")
    assert snapshot.why == "first" and snapshot.answered.is_set() and snapshot.settled.is_set()


def test_a_write_after_the_copy_is_seen(snapshot: Snapshot) -> None:
    assert snapshot.is_as_copied()  # nothing was
    snapshot.target = memoryview(bytearray(snapshot.image.nbytes))
    for part in snapshot.image.parts:
        copy_part(part, snapshot.pieces[part.piece], snapshot.target)
    assert snapshot.is_as_copied()
    snapshot.pieces[0].tensor.view(-1)[0] += 1
    assert not snapshot.is_as_copied()
