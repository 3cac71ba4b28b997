"""A run's past, from whatever its events say."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import Refused
from trainer.track import history
from trainer.track.history import History


def write(run_dir: Path, *lines: Any) -> None:
    (run_dir / "events.jsonl").write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )


def test_a_run_without_events_has_no_past(tmp_path: Path) -> None:
    assert History.of(tmp_path) == History(0, set(), None, False)


def test_starts_ids_and_what_was_saved(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"event": "start", "incarnation": 1, "run_id": "a"},
        {"event": "snapshot", "step": 3, "generation": "g"},
        {"event": "snapshot", "step": 4, "skipped": "room"},
        {"event": "resume", "incarnation": 5, "run_id": "b"},
        {"event": "commit", "step": 4, "skipped": "full"},
    )
    assert History.of(tmp_path) == History(5, {"a", "b"}, 3, False)
    write(tmp_path, {"event": "commit", "step": 4, "generation": "g"})
    assert History.of(tmp_path).committed


@pytest.mark.parametrize("number", ["x", None, [1], -3, 1e400, 2**40, "nan"])
def test_what_no_run_has_written_is_passed_over(number: Any, tmp_path: Path) -> None:
    torn = '{"event": "resume", "incarnation": 9'
    write(tmp_path, {"event": "start", "incarnation": 2}, {"event": "resume", "incarnation": number}, "[" * 5000, torn)
    assert History.of(tmp_path).incarnation == 2


def test_lines_that_are_no_events_are_not_even_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of them may lie in somebody else's file."""
    write(tmp_path, *[{}] * 1000, {"event": "start", "incarnation": 2})
    parsed = list[bytes]()
    loads = json.loads
    monkeypatch.setattr(history.json, "loads", lambda line: parsed.append(line) or loads(line))
    assert History.of(tmp_path).incarnation == 2 and len(parsed) == 1


def test_a_file_that_is_none_is_refused_and_a_disk_that_fails_is_not_its_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(Refused, match="is no record of a run"):
        History.of(tmp_path)

    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(history, "open_file", fails)
    with pytest.raises(OSError, match="Input/output"):
        History.of(tmp_path)
