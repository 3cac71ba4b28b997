"""Reading what strace writes: threads, descriptors, offsets, and the calls that it must not pass over."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.crash_model import Operation
from benchmarks.crash_trace import below, calls, operations

TOP = Path("/top")


def hexed(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def traced(*lines: str) -> str:
    """A trace whose strings and paths are written in curly and angle brackets, one line a microsecond."""
    made = []
    for number, line in enumerate(lines):
        pid, _, rest = line.partition(" ")
        for name in ("/top/a/x", "/top/b", "/top/a", "/top", "/elsewhere", "hello", "he", "l", "x"):
            rest = rest.replace(f"<{name}>", f"<{hexed(name)}>").replace(f'"{name}"', f'"{hexed(name)}"')
        made.append(f"{pid} 1700000000.{number:06d} {rest}\n")
    return "".join(made)


def seen(*lines: str) -> list[Operation]:
    return operations(traced(*lines), TOP, 3)


def brief(*lines: str) -> list[tuple[object, ...]]:
    return [
        tuple(f for f in (op.kind, op.path, op.other, op.data, op.at) if f not in ("", b"", None))
        for op in seen(*lines)
    ]


OPEN = '7 openat(AT_FDCWD</elsewhere>, "/top/a/x", O_WRONLY|O_CREAT|O_CLOEXEC, 0666) = 3</top/a/x> <0.000001>'


def test_calls_become_operations_below_the_directory() -> None:
    assert brief(
        '7 mkdir("/top/a", 0777) = 0 <0.000001>',
        OPEN,
        '7 write(3</top/a/x>, "hello", 5) = 5 <0.000001>',
        '7 writev(3</top/a/x>, [{iov_base="he", iov_len=2}, {iov_base="l", iov_len=1}], 2) = 3 <0.000001>',
        '7 pwrite64(3</top/a/x>, "he", 2, 1) = 2 <0.000001>',
        '7 pwritev2(3</top/a/x>, [{iov_base="he", iov_len=2}], 1, 7, 0) = 2 <0.000001>',
        "7 ftruncate(3</top/a/x>, 6) = 0 <0.000001>",
        "7 fdatasync(3</top/a/x>) = 0 <0.000001>",
        '7 link("/top/a/x", "/top/b") = 0 <0.000001>',
        '7 renameat(AT_FDCWD</elsewhere>, "/top/b", 4</top/a>, "l") = 0 <0.000001>',
        '7 unlinkat(4</top/a>, "l", 0) = 0 <0.000001>',
        '7 unlinkat(AT_FDCWD</top/a>, "/top/b", AT_REMOVEDIR) = 0 <0.000001>',
        "7 fsync(5</top>) = 0 <0.000001>",
        '7 mkdir("/elsewhere", 0777) = 0 <0.000001>',
        '7 unlink("/top/b") = -1 ENOENT (No such file or directory) <0.000001>',
        "7 fsync(5</top>) = ?",
    ) == [
        ("mkdir", "a"),
        ("open", "a/x"),
        ("write", "a/x", b"hello", 0),
        ("write", "a/x", b"hel", 5),
        ("write", "a/x", b"he", 1),
        ("write", "a/x", b"he", 7),
        ("resize", "a/x", 6),
        ("sync", "a/x"),
        ("link", "a/x", "b"),
        ("rename", "b", "a/l"),
        ("unlink", "a/l"),
        ("rmdir", "b"),
        ("sync",),
    ]


def test_descriptors_share_and_move_their_position() -> None:
    found = seen(
        OPEN,
        "7 dup(3</top/a/x>) = 4</top/a/x> <0.000001>",
        '7 write(4</top/a/x>, "hello", 5) = 2 <0.000001>',  # of which only two bytes were taken
        '7 write(3</top/a/x>, "l", 1) = 1 <0.000001>',
        "7 lseek(3</top/a/x>, 9, SEEK_SET) = 9 <0.000001>",
        "7 fcntl(4</top/a/x>, F_DUPFD_CLOEXEC, 10) = 10</top/a/x> <0.000001>",
        '7 write(10</top/a/x>(deleted), "l", 1) = 1 <0.000001>',
        "7 close(3</top/a/x>) = 0 <0.000001>",
        '7 openat(AT_FDCWD</elsewhere>, "/top/b", O_WRONLY|O_APPEND) = 3</top/b> <0.000001>',
        '7 write(3</top/b>, "l", 1) = 1 <0.000001>',
    )
    assert [(op.path, op.data, op.at) for op in found if op.kind == "write"] == [
        ("a/x", b"he", 0),
        ("a/x", b"l", 2),
        ("a/x", b"l", 9),
        ("b", b"l", None),
    ]
    assert {op.rank for op in found} == {3}
    with pytest.raises(ValueError, match="/top/a/x was opened before the recording began"):
        seen(OPEN, "7 close(3</top/a/x>) = 0 <0.000001>", '7 write(3</top/a/x>, "l", 1) = 1 <0.000001>')


def test_interrupted_calls_of_threads_are_put_together() -> None:
    text = traced(
        "7 fsync(3</top/a/x> <unfinished ...>",
        '8 write(3</top/a/x>, "hello", 5 <unfinished ...>',
        "7 <... fsync resumed>) = 0 <0.000090>",
        "9 +++ exited with 0 +++",
        "8 <... write resumed>) = 5 <0.000002>",
        "7 fsync(3</top/a/x>) = 0 <0.000300>",  # longer than the time to the next line: rounding
        "8 close(3</top/a/x>) = 0 <0.000300>",
    )
    start = 1_700_000_000_000_000
    assert [(call.name, call.began - start, call.ended - start) for call in calls(text)] == [
        ("fsync", 0, 2),
        ("write", 1, 4),
        ("fsync", 5, 6),
        ("close", 6, 6),
    ]
    assert calls(text)[1].strings == [b"hello"]


def test_what_cannot_be_replayed_is_refused() -> None:
    for line, why in {
        '7 symlink("/top/a", "/top/b") = 0 <0.000001>': "the replay does not know symlink",
        "7 fallocate(3</top/a>, 0, 0, 9) = 0 <0.000001>": "the replay does not know fallocate",
        '7 renameat2(AT_FDCWD</top>, "/top/a", AT_FDCWD</top>, "/top/b", RENAME_EXCHANGE) = 0 <0.000001>': "renameat2",
        '7 rename("/elsewhere", "/top/a") = 0 <0.000001>': "cannot follow a file into or out of /top",
        '7 openat(AT_FDCWD</top>, "/top/a", O_WRONLY|O_TMPFILE, 0666) = 3</top/a> <0.000001>': "without a name",
        '7 pwrite64(3</top/a>, "he"..., 99, 0) = 99 <0.000001>': "longer than the 4194304 bytes",
    }.items():
        with pytest.raises(ValueError, match=why):
            seen(line)


def test_a_part_of_the_directory() -> None:
    found = [Operation("mkdir", "a"), Operation("open", "ab/x"), Operation("link", "a/x", "a/y"), Operation("sync", "")]
    assert below(found, "a") == [Operation("mkdir", ""), Operation("link", "x", "y")]
    with pytest.raises(ValueError, match="cannot follow a file into or out of a"):
        below([Operation("rename", "a/x", "b/x")], "a")
