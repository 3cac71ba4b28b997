"""What strace wrote about a process and its threads, as operations on the files below one directory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks.crash_model import Kind, Operation

# Every call that changes files or names, and those that tell where a descriptor's next write goes. A call that the
# kernel or the machine does not have is no error, because of the question mark.
CALLS = (
    "?open,?openat,?openat2,?creat,?close,?dup,?dup2,?dup3,?fcntl,?lseek,?write,?writev,?pwrite64,?pwritev,?pwritev2,"
    "?ftruncate,?truncate,?fallocate,?copy_file_range,?sendfile,?splice,?fsync,?fdatasync,?link,?linkat,?symlink,"
    "?symlinkat,?rename,?renameat,?renameat2,?unlink,?unlinkat,?mkdir,?mkdirat,?rmdir,?mknod,?mknodat"
)
LONGEST = 4 * 1024 * 1024  # of a write that is recorded in full
OPTIONS = ["-f", "-ttt", "-T", "-y", "-xx", "-s", str(LONGEST), "-e", "signal=none"]
OPTIONS += ["-e", f"trace={CALLS}"]

_LINE = re.compile(r"(\d+) +(\d+)\.(\d{6}) (.*)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)(.*)", re.DOTALL)
_TOOK = re.compile(r"<(\d+)\.(\d{6})>$")
_STRING = re.compile(r'"([^"]*)"(\.\.\.)?')
_FILE = re.compile(r"(\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>")  # "(deleted)" may follow
UNFINISHED = " <unfinished ...>"


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that succeeded, from its start to its end in microseconds."""

    name: str
    arguments: str
    result: int
    began: int
    ended: int

    @property
    def strings(self) -> list[bytes]:
        found = _STRING.findall(self.arguments)
        if any(cut for _, cut in found):
            raise ValueError(f"a string of {self.name} is longer than the {LONGEST} bytes that are recorded")
        return [_unescaped(text) for text, _ in found]

    @property
    def parts(self) -> list[str]:
        return self.arguments.split(", ")

    @property
    def files(self) -> list[tuple[int, str]]:
        """The descriptors among the arguments, with their paths; the working directory is -1."""
        found = _FILE.findall(self.arguments)
        return [(int(number) if number.isdigit() else -1, _unescaped(path).decode()) for number, path in found]

    @property
    def paths(self) -> list[str]:
        """The strings as paths, each below the directory that its call names in front of it."""
        tops = [path for _, path in self.files] or ["/"]
        names = [text.decode() for text in self.strings]
        return [str(PurePosixPath(tops[min(i, len(tops) - 1)], name)) for i, name in enumerate(names)]


def operations(text: str, root: Path, rank: int) -> list[Operation]:
    """One process's operations below a directory. It must use absolute paths, or those relative to a descriptor."""
    hint = _escaped(str(root))  # most of a trace is about libraries, and is not looked at
    reader = _Reader(str(root), rank)
    found = (reader.read(call) for call in calls(text) if hint in call.arguments)
    return [operation for operation in found if operation is not None]


def calls(text: str) -> list[Call]:
    """The calls that succeeded, in the order in which they began.

    The lines are in the order of the events. So a call ended before the line behind its own, whatever the rounding of
    its duration says, and one that strace had to interrupt ended at the line that resumes it.
    """
    lines = [(m[1], int(m[2] + m[3]), m[4]) for line in text.splitlines() if (m := _LINE.match(line))]
    started: dict[str, tuple[int, int, str]] = {}
    found = []
    for number, (pid, at, rest) in enumerate(lines):
        if rest.endswith(UNFINISHED):
            started[pid] = (number, at, rest.removesuffix(UNFINISHED))
            continue
        first, began, ended, head = number, at, at, ""
        if rest.startswith("<... "):
            first, began, head = started.pop(pid)
            rest = rest.partition(" resumed>")[2]
        elif took := _TOOK.search(rest):
            behind = lines[number + 1][1] if number + 1 < len(lines) else at
            ended = max(at, min(at + int(took[1] + took[2]), behind))
        if (parsed := _CALL.match(head + rest)) and int(parsed[3]) >= 0:
            found.append((first, Call(parsed[1], parsed[2], int(parsed[3]), began, ended)))
    return [call for _, call in sorted(found, key=lambda item: item[0])]


def below(found: Iterable[Operation], directory: str) -> list[Operation]:
    """The operations on a subdirectory, relative to it."""

    def inner(path: str) -> str | None:
        return path[len(directory) :].lstrip("/") if f"{path}/".startswith(f"{directory}/") else None

    kept = []
    for operation in found:
        path, other = inner(operation.path), inner(operation.other)
        if operation.other and (path is None) != (other is None):
            raise ValueError(f"the replay cannot follow a file into or out of {directory}: {operation}")
        if path is not None:
            kept.append(replace(operation, path=path, other=other or ""))
    return kept


class _Reader:
    """Follows where each descriptor writes next, and tells what a call did."""

    def __init__(self, root: str, rank: int) -> None:
        self._root, self._rank = root, rank
        self._positions: dict[int, list[int | None]] = {}  # by descriptor, shared by its duplicates; None appends

    def read(self, call: Call) -> Operation | None:
        match call.name:
            case "open" | "openat" | "openat2" | "creat":
                return self._open(call)
            case "dup" | "dup2" | "dup3" | "fcntl" | "close" | "lseek":
                self._move(call)
                return None
            case "write" | "writev" | "pwrite64" | "pwritev" | "pwritev2":
                return self._write(call)
            case "fsync" | "fdatasync":
                return self._made("sync", call, [call.files[0][1]])
            case "ftruncate":
                return self._made("resize", call, [call.files[0][1]], at=int(call.parts[1]))
            case "truncate":
                return self._made("resize", call, call.paths, at=int(call.parts[1]))
            case "mkdir" | "mkdirat":
                return self._made("mkdir", call, call.paths)
            case "rmdir" | "unlink" | "unlinkat":
                directory = call.name == "rmdir" or "AT_REMOVEDIR" in call.arguments
                return self._made("rmdir" if directory else "unlink", call, call.paths)
            case "link" | "linkat":
                return self._made("link", call, call.paths)
            case "rename" | "renameat" | "renameat2" if not re.search("RENAME_(EXCHANGE|WHITEOUT)", call.arguments):
                return self._made("rename", call, call.paths)
        raise ValueError(f"the replay does not know {call.name}({call.arguments[:200]})")

    def _open(self, call: Call) -> Operation | None:
        if "O_TMPFILE" in call.arguments:
            raise ValueError("the replay does not know files that are made without a name")
        self._positions[call.result] = [None if "O_APPEND" in call.arguments else 0]
        truncate = call.name == "creat" or "O_TRUNC" in call.arguments
        if not truncate and "O_CREAT" not in call.arguments:
            return None
        return self._made("open", call, call.paths, truncate=truncate)

    def _move(self, call: Call) -> None:
        descriptor = call.files[0][0]
        if call.name == "close":
            self._positions.pop(descriptor, None)
        elif call.name == "lseek":
            if (position := self._positions.get(descriptor)) and position[0] is not None:
                position[0] = call.result
        elif call.name != "fcntl" or "F_DUPFD" in call.arguments:
            self._positions[call.result] = self._positions.get(descriptor, [])

    def _write(self, call: Call) -> Operation | None:
        descriptor, path = call.files[0]
        data = b"".join(call.strings)[: call.result]
        if call.name in ("write", "writev"):
            if not (position := self._positions.get(descriptor)):
                raise ValueError(f"{path} was opened before the recording began")
            at = position[0]
            if at is not None:
                position[0] = at + len(data)
        else:
            at = int(call.parts[-2 if call.name == "pwritev2" else -1])
        return self._made("write", call, [path], at=at, data=data)

    def _made(self, kind: Kind, call: Call, paths: list[str], **fields: Any) -> Operation | None:
        inside = [self._inside(path) for path in paths]
        if all(path is None for path in inside):
            return None
        if None in inside:
            raise ValueError(f"the replay cannot follow a file into or out of {self._root}: {call.name} {paths}")
        path, other = [*inside, ""][:2]
        return Operation(kind, path or "", other or "", rank=self._rank, began=call.began, ended=call.ended, **fields)

    def _inside(self, path: str) -> str | None:
        return path[len(self._root) :].lstrip("/") if f"{path}/".startswith(f"{self._root}/") else None


def _escaped(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def _unescaped(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
