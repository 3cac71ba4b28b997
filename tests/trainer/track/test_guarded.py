"""What fails is off, and said once."""

from __future__ import annotations

import pytest

from trainer.track.guarded import Guarded


def test_a_failure_is_said_once_and_nothing_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[int] = []
    guarded = Guarded("somebody's tracker")
    guarded.guard(lambda: ran.append(1))
    guarded.guard(lambda: 1 / 0)
    guarded.guard(lambda: ran.append(2))
    assert ran == [1] and not guarded.alive
    assert [record.getMessage() for record in caplog.records] == [
        "somebody's tracker failed and is off for the rest of this run: ZeroDivisionError: division by zero"
    ]
