"""A storage that fails: calls on the files of a run, recorded or made to fail, in any process of it.

Python's own calls are replaced (`os.write`, `os.fsync`, `open`, ...), for paths below given directories only. The
environment says what to do, so that keepers and trainers that a process starts do it as well: `environment()` makes
it, and `faulty_site/sitecustomize.py` installs it where Python starts.

A call is told apart by who makes it (trainer, keeper, launcher), when (before the first line of metrics or after it),
which it is, and what kind of file it is on: `write checkpoints/step-#-#/shard-#.bin`. Nothing but the standard library
is imported here: what is imported first is part of what is tried.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

VARIABLE = "EVERSHARD_FAULTY_STORAGE"
READS = frozenset({"open", "read", "pread", "preadv", "stat", "lstat", "scandir", "listdir", "fstat"})
SYNCS = frozenset({"fsync", "fdatasync"})
ON_DESCRIPTORS = ("read", "pread", "preadv", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "fstat")
ON_PATHS = ("stat", "lstat", "scandir", "listdir", "unlink", "remove", "rmdir", "mkdir", "truncate", "utime", "chmod")
ON_TWO = ("rename", "replace", "link", "symlink")
NUMBER = re.compile(r"[0-9a-f]{8,}|[0-9]+")
FIRST_LINE = ("write", "run/metrics.jsonl")  # by which a trainer is known to train


@dataclass(frozen=True, order=True)
class Call:
    """One kind of call, as it is told apart from others."""

    role: str
    phase: str  # start or train; a keeper serves
    name: str  # of the call; a file opened to be written is `create`
    file: str  # which directory, and the path in it without numbers

    def __str__(self) -> str:
        return f"{self.role}, {self.phase}: {self.name} {self.file}"


@dataclass(frozen=True)
class Fault:
    """What becomes of one kind of call: an error, or a stall. The first `after` calls of a process pass."""

    call: Call
    error: str = ""  # such as ENOSPC
    stall_s: float = 0.0
    times: int = 0  # so many calls, whichever process makes them; 0 for all
    after: int = 0


def environment(directories: dict[str, str], record: str, fault: Fault | None = None) -> dict[str, str]:
    """Variables that have a process and what it starts note their calls in `record`, and suffer `fault`."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = {"directories": directories, "record": record, "fault": None if fault is None else asdict(fault)}
    return {VARIABLE: json.dumps(spec), "PYTHONPATH": os.path.join(here, "faulty_site")}


def recorded(record: str) -> tuple[dict[Call, int], int]:
    """How often each call was made, and how many faults there were."""
    calls, faults = dict[Call, int](), 0
    try:
        with open(record) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return calls, faults
    for line in lines:
        kind, *words = json.loads(line)
        if kind == "fault":
            faults += 1
        else:
            call = Call(*words)
            calls[call] = calls.get(call, 0) + 1
    return calls, faults


class Faulty:
    """The replaced calls of this process."""

    def __init__(self, spec: dict[str, Any], role: str) -> None:
        self.role, self.phase = role, "serve" if role == "keeper" else "start"
        # What lies in another comes first: checkpoints are in the run's directory.
        places: dict[str, str] = {name: os.path.realpath(path) for name, path in spec["directories"].items()}
        self.places = sorted(places.items(), key=lambda one: -len(one[1]))
        self.open, self.write = os.open, os.write
        self.readlink: Callable[[str], str] = os.readlink
        self.record = self.open(spec["record"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        told = spec["fault"]
        self.fault = None if told is None else replace(Fault(**told), call=Call(**told["call"]))
        self.counts = spec["record"]
        self.seen = 0

    def install(self) -> None:
        for name in ON_DESCRIPTORS:
            self._replace(name, lambda first, *_, **__: self._of_descriptor(first))
        for name in ON_PATHS:
            self._replace(name, lambda first=".", *_, **more: self._of_path(first, more.get("dir_fd")))
        for name in ON_TWO:
            self._replace(name, lambda _, second, **__: self._of_path(second))
        inner_open = os.open

        def os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._call("create" if writes else "open", self._of_path(path, dir_fd))
            return inner_open(path, flags, mode, dir_fd=dir_fd)

        os.open = os_open
        builtins.open = io.open = self._opener(io.open)

    def _replace(self, name: str, file_of: Callable[..., str]) -> None:
        inner = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            self._call(name, file_of(*arguments, **more))
            return inner(*arguments, **more)

        setattr(os, name, call)
        for several in (os.supports_dir_fd, os.supports_follow_symlinks, os.supports_fd):
            if inner in several:
                several.add(call)

    def _opener(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        faulty = self

        class File(io.FileIO):
            """Its reads and writes pass through here, rather than through the library of C alone."""

            def readinto(self, buffer: Any, /) -> Any:
                faulty._call("read", faulty._of_descriptor(self.fileno()))
                return super().readinto(buffer)

            def readall(self) -> Any:
                faulty._call("read", faulty._of_descriptor(self.fileno()))
                return super().readall()

            def write(self, data: Any, /) -> Any:
                faulty._call("write", faulty._of_descriptor(self.fileno()))
                return super().write(data)

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            kind = self._of_descriptor(file) if isinstance(file, int) else self._of_path(file)
            if not kind:
                return inner(file, mode, buffering, encoding, errors, newline, closefd, opener)
            writes = set(mode) & set("wax+")
            if not isinstance(file, int):
                self._call("create" if writes else "open", kind)
            raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom if "+" in mode else io.BufferedWriter if writes else io.BufferedReader
            wrapped = buffered(raw)
            if "b" in mode:
                return wrapped
            text = io.TextIOWrapper(wrapped, encoding, errors, newline, line_buffering=buffering == 1)
            text.mode = mode  # type: ignore[misc]
            return text

        return opened

    def _of_descriptor(self, descriptor: Any) -> str:
        if not isinstance(descriptor, int):
            return self._of_path(descriptor)
        try:
            path = self.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return ""
        return self._kind(str(path).removesuffix(" (deleted)"))

    def _of_path(self, path: Any, dir_fd: int | None = None) -> str:
        if isinstance(path, int):
            return self._of_descriptor(path)
        text: str = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):
            try:
                text = os.path.join(self.readlink(f"/proc/self/fd/{dir_fd}"), text)
            except OSError:
                return ""
        return self._kind(os.path.normpath(os.path.join(os.getcwd(), text)))

    def _kind(self, path: str) -> str:
        for name, place in self.places:
            if path == place:
                return name
            if path.startswith(place + "/"):
                return f"{name}/{NUMBER.sub('#', path[len(place) + 1 :])}"
        return ""

    def _call(self, name: str, file: str) -> None:
        if not file:
            return
        call = Call(self.role, self.phase, name, file)
        if self.role == "trainer" and (name, file) == FIRST_LINE:
            self.phase = "train"
        fault = self.fault
        if fault is None:
            self._note("call", call.role, call.phase, call.name, call.file)
            return
        if call != fault.call:
            return
        self.seen += 1
        if self.seen <= fault.after or not self._is_left():
            return
        self._note("fault", str(call))
        if fault.stall_s:
            time.sleep(fault.stall_s)
        else:
            number = getattr(errno, fault.error)
            raise OSError(number, os.strerror(number), file)

    def _is_left(self) -> bool:
        """Whether the fault is still to happen: a keeper that is started again does not suffer it once more."""
        assert self.fault is not None
        for number in range(self.fault.times):
            try:
                os.close(self.open(f"{self.counts}.{number}", os.O_CREAT | os.O_EXCL, 0o644))
            except FileExistsError:
                continue
            return True
        return not self.fault.times

    def _note(self, *words: str) -> None:
        self.write(self.record, json.dumps(words).encode() + b"\n")


def role_of(words: list[str]) -> str:
    """Who a process is, by what it was started with; nothing for others, such as compilers."""
    text = " ".join(words)
    if "checkpointing.memory.keeper" in text:
        return "keeper"
    if "torch.distributed.run" in text or "-m launch" in text:
        return "launcher"
    return "trainer" if "trainer" in text else ""


def install_from_environment(words: list[str]) -> None:
    if (told := os.environ.get(VARIABLE)) and (role := role_of(words)):
        Faulty(json.loads(told), role).install()


def main() -> None:
    """`python -m tests.harness.faulty MODULE ...`: for a fork, in which Python does not start anew."""
    import runpy

    module = sys.argv[1]
    del sys.argv[:1]
    install_from_environment(["-m", module])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
