"""What a launcher is told of how a run ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointing.errors import CheckpointError, LeaseHeldError
from trainer.errors import Refused, TrainingFailed
from trainer.outcome import DIRECTORY, Outcome, leave, read


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "status", "final"),
    [
        (Refused("no such option"), 2, True),
        (caused(Refused("another run uses it"), LeaseHeldError("held")), 2, False),
        (TrainingFailed("a loss of nan"), 1, True),
        (caused(TrainingFailed("step 3 could not be saved"), OSError("no space")), 1, False),
        (CheckpointError("a peer is gone"), 1, False),
        (RuntimeError("connection closed by peer"), 1, False),
        (KeyboardInterrupt(), 130, False),
    ],
)
def test_what_would_end_like_this_again(error: BaseException, status: int, final: bool) -> None:
    found = Outcome.of(error)
    assert (found.status, found.final) == (status, final) and str(error) in found.why


def test_the_rank_that_explains_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path) is None
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    for rank, outcome in enumerate(
        [Outcome(1, False, "connection closed"), Outcome(2, True, "no data here"), Outcome(75, False, "preempted")]
    ):
        monkeypatch.setenv("RANK", str(rank))
        leave(outcome)
    (tmp_path / "rank-7.json").write_text('{"torn')
    assert read(tmp_path) == Outcome(2, True, "no data here", 1)
    (tmp_path / "rank-1.json").unlink()
    found = read(tmp_path)
    assert found is not None and found.status == 1


def test_one_that_left_without_a_save_explains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun tells the others to leave when one has failed, and they may leave as if they were preempted."""
    monkeypatch.setenv(DIRECTORY, str(tmp_path))

    def ended(*outcomes: Outcome) -> Outcome | None:
        for rank, outcome in enumerate(outcomes):
            monkeypatch.setenv("RANK", str(rank))
            leave(outcome)
        return read(tmp_path)

    failed, alone = Outcome(1, False, "out of memory"), Outcome(75, False, "preempted: 30 seconds have passed")
    found = ended(alone, alone, failed)
    assert found is not None and found.why == "out of memory"
    together = Outcome(75, False, "preempted after step 7", saved=True)
    found = ended(together, alone, failed)  # rank 2 failed after all had saved
    assert found is not None and found.saved


def test_nobody_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY, raising=False)
    leave(Outcome(0, True))
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "gone"))
    leave(Outcome(0, True))
    assert list(tmp_path.iterdir()) == []
