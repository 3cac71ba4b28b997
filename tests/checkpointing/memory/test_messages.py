"""What goes over the socket comes out as it went in, and nothing else is taken for a message."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointing.memory import messages
from checkpointing.memory.directory import make_directory
from checkpointing.memory.messages import Lines, ProtocolError, connect, encode, is_same_user, listen

plain = st.none() | st.booleans() | st.integers() | st.text()
values = st.recursive(plain, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)


@pytest.mark.usefixtures("long")
@given(st.lists(st.dictionaries(st.text(), values)), st.integers(1, 50))
def test_messages_survive_being_cut_anywhere(given_: list[dict[str, object]], step: int) -> None:
    sent = [{**message, "kind": "x"} for message in given_]
    data = b"".join(map(encode, sent))
    lines, found = Lines(), []
    for start in range(0, len(data), step):
        found += list(lines.feed(data[start : start + step]))
    assert found == sent


@given(st.binary())
def test_anything_else_is_refused_or_waits_for_its_end(data: bytes) -> None:
    lines = Lines()
    with contextlib.suppress(ProtocolError):
        assert all(isinstance(message["kind"], str) for message in lines.feed(data))


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b"{}", b'{"kind": 3}', b"\xff\xfe", b"[" * 5000])
def test_what_is_no_message(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(Lines().feed(line + b"\n"))


def test_a_line_without_an_end_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_BYTES", 100)
    lines = Lines()
    with pytest.raises(ProtocolError, match="over 100 bytes"):
        for _ in range(20):
            list(lines.feed(b"x" * 10))


def test_a_socket_under_a_long_path(tmp_path: Path) -> None:
    root = tmp_path / ("x" * 120)
    make_directory(root)
    with listen(root) as server, connect(root) as client:
        assert ((root / "keeper.sock").stat().st_mode & 0o777) == 0o600
        there, _ = server.accept()
        with there:
            assert is_same_user(there)
            client.sendall(encode({"kind": "x"}))
            assert list(Lines().feed(there.recv(100))) == [{"kind": "x"}]
    with pytest.raises(OSError):
        connect(root)
