"""A directory is the run that it was when that was recorded, until it is copied, moved or renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from trainer.identity import NAME, came_from, identify, recorded


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


def test_a_run_keeps_its_id(run: Path) -> None:
    first = identify(run, None)
    assert identify(run, first) == first and came_from(run) == ""
    found = recorded(run)
    assert found is not None and found.run_id == first and found.directory == str(run)
    assert identify(run, None) != first  # one that begins


@pytest.mark.parametrize("how", ["copied", "moved", "put back under its name"])
def test_a_copy_knows_that_it_is_one(how: str, run: Path) -> None:
    identify(run, "r1")
    other = run.parent / "b"
    if how == "copied":
        shutil.copytree(run, other)
    elif how == "moved":
        run.rename(other)
    else:
        shutil.copytree(run, run.parent / "c")
        held = os.open(run, os.O_RDONLY)  # or its number may be given again
        shutil.rmtree(run)
        (run.parent / "c").rename(run)
        other = run
    assert came_from(other) == str(run)
    identify(other, "r2")
    assert came_from(other) == "" and (how != "copied" or came_from(run) == "")
    if how == "put back under its name":
        os.close(held)


def test_other_ways_to_the_same_directory_are_no_copies(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identify(run, "r1")
    (run.parent / "link").symlink_to(run)
    monkeypatch.chdir(run.parent)
    for way in (run.parent / "link", Path("a"), Path("a/../a")):
        assert came_from(way) == ""


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"directory": 1, "inode": "x", "run_id": null}', "\0"])
def test_a_record_that_says_nothing_is_none(content: str, run: Path) -> None:
    (run / NAME).write_text(content)
    assert recorded(run) is None and came_from(run) == ""
    identify(run, "r1")
    assert recorded(run) is not None


def test_a_record_elsewhere_is_not_followed(run: Path) -> None:
    identify(run, "r1")
    (run.parent / "b").mkdir()
    (run.parent / "b" / NAME).symlink_to(run / NAME)
    assert recorded(run.parent / "b") is None


@pytest.mark.parametrize(
    "content", ["[" * 60_000, '{"directory": "/x", "inode": 1e999, "run_id": "r"}', "{}", "\\x00", "[1]"]
)
def test_a_record_that_is_none_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / ".identity.json").write_text(content)
    assert recorded(tmp_path) is None
