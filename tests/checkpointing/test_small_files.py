"""Small files are durable and never half there; documents of somebody else are bounded, and files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from checkpointing import DamagedError, NotFoundError
from checkpointing.small_files import (
    DOCUMENT_BYTES,
    DRAFT,
    SMALL_FILE_BYTES,
    read_json,
    read_object,
    read_small,
    read_text,
    replace_file,
)


@pytest.mark.parametrize("what", ["absent", "a link", "a pipe", "too long", "small"])
def test_a_small_file_is_read_if_it_is_one(what: str, tmp_path: Path) -> None:
    path = tmp_path / "id"
    if what == "a link":
        (tmp_path / "secret").write_text("secret")
        path.symlink_to(tmp_path / "secret")
    elif what == "a pipe":
        os.mkfifo(path)
    elif what != "absent":
        path.write_bytes(bytes(5 if what == "small" else SMALL_FILE_BYTES + 1))
    if what == "small":
        assert read_small(path) == bytes(5)
        return
    with pytest.raises(NotFoundError if what == "absent" else DamagedError):
        read_small(path)


def test_documents_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1]}')
    (tmp_path / "link").symlink_to(path)
    assert read_json(path) == read_json(tmp_path / "link") == {"a": [1]}
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="too deep"):
        read_json(path)
    with open(path, "wb") as file:
        file.truncate(DOCUMENT_BYTES + 1)
    with pytest.raises(OSError, match="too large"):
        read_text(path)
    os.mkfifo(tmp_path / "pipe")
    for none in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError):
            read_text(none)


@pytest.mark.parametrize("text", ["[1]", "{", '"a"'])
def test_a_document_that_is_no_object_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "d").write_text(text)
    with pytest.raises(DamagedError, match="no JSON"):
        read_object(tmp_path / "d")
    (tmp_path / "d").write_text('{"a": 1}')
    assert read_object(tmp_path / "d") == {"a": 1}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "id"
    replace_file(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old" and not list(tmp_path.glob(f"{DRAFT}*"))
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
