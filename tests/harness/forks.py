"""Python processes forked from one that has imported everything: they start in milliseconds rather than in seconds.

`Fork([sys.executable, "-m", "trainer", ...])` is a `subprocess.Popen` whose process is forked from a server. The
server has imported torch, transformers, DeepSpeed and ours, has started no thread and computed nothing. A forked
process differs from a started one in what it has imported, with the environment that counted then (as HF_HOME does),
in its hash seed, which all forks share, and in its parent, which is the server; its words and environment are in /proc
as ever.

A launcher that is forked gets a server of its own, forked before anything happened in it, so that the trainers it
starts are forks as well, and live below the launcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.harness.processes import ROOT

ADDRESS = "EVERSHARD_FORK_SERVER"  # where it listens, in the environment of whoever may ask
WAIT_S = 120.0
ROOM = 16384  # bytes for the words of a fork, and for its environment, which it writes over the server's own
IGNORABLE = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # what a shell has background jobs and nohup ignore
TRAINER = str(ROOT / "trainer" / "__main__.py")  # by path, as launchers start it
PRELOADED = (
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "peft",
    "deepspeed",
    "accelerate",
    "wandb",
    "hypothesis",
    "tests.conftest",
    "trainer.cli",
    "trainer.run",
    "trainer.parallel.accelerate_engine",
    "trainer.parallel.deepspeed_engine",
    "trainer.methods.__main__",
    "launch.local",
    "launch.supervise",
    "checkpointing.memory.keeper",
)


def preload() -> None:
    """Import what tests use, so that no single one of them pays for it."""
    unset = "DS_ACCELERATOR" not in os.environ
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in PRELOADED:
        importlib.import_module(name)
    if unset:  # what is started later looks for one itself
        del os.environ["DS_ACCELERATOR"]


class Server:
    """The process that forks, as whoever starts it sees it. It ends when that one does."""

    def __init__(self) -> None:
        address = _fresh_address()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # until it stops
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.forks", address, " " * ROOM],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ROOM": " " * ROOM},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        os.environ[ADDRESS] = address

    def stop(self) -> None:
        os.environ.pop(ADDRESS, None)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        if self._process.wait(WAIT_S):
            self._log.seek(0)
            sys.stderr.write(self._log.read().decode(errors="replace"))
        self._log.close()


class Fork(subprocess.Popen):  # type: ignore[type-arg]
    """`python -m MODULE ...` or `python FILE ...`, forked from the server that the environment names."""

    def _execute_child(self, *arguments: Any, **options: Any) -> None:
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments, **options).arguments  # type: ignore[attr-defined]
        words = [os.fspath(word) for word in given["args"]]
        if words[0] != sys.executable or words[1] == "-c":
            raise ValueError(f"only modules and files of this Python can be forked, not {words[:3]}")
        sys.audit("tests.fork", words)
        descriptors = {
            0: 0 if given["p2cread"] == -1 else given["p2cread"],
            1: 1 if given["c2pwrite"] == -1 else given["c2pwrite"],
            2: 2 if given["errwrite"] == -1 else given["errwrite"],
            **{number: number for number in given["pass_fds"]},
        }
        request = {
            "words": words,
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "directory": os.fspath(given["cwd"] or os.getcwd()),
            "session": bool(given["start_new_session"]),
            "descriptors": list(descriptors),
            "ignored": [number for number in IGNORABLE if signal.getsignal(number) is signal.SIG_IGN],
        }
        self._asked = _connect(os.environ[ADDRESS])
        text = json.dumps(request).encode()
        socket.send_fds(self._asked, [struct.pack("!I", len(text))], list(descriptors.values()))
        self._asked.sendall(text)
        self.pid = _number(self._asked)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if wait_flags & os.WNOHANG and not select.select([self._asked], [], [], 0)[0]:
            return 0, 0
        try:
            status = _number(self._asked)
        except EOFError:  # the server is gone, and nobody can tell
            status = signal.SIGKILL
        self._asked.close()
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)  # type: ignore[attr-defined]
            except (OSError, ValueError):
                self.returncode = _deadstate
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def _fresh_address() -> str:
    """In the abstract namespace of sockets, where nothing is left behind."""
    return f"evershard-forks-{os.getpid()}-{os.urandom(4).hex()}"


def _connect(address: str) -> socket.socket:
    """Waits for a server that still imports."""
    deadline = time.monotonic() + WAIT_S
    while True:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.connect("\0" + address)
            return made
        except ConnectionRefusedError:
            made.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _number(connection: socket.socket) -> int:
    data = b""
    while len(data) < 4:
        part = connection.recv(4 - len(data))
        if not part:
            raise EOFError
        data += part
    return int(struct.unpack("!I", data)[0])


# ---- in the server


class _Serving:
    """The loop of a server. `serve` returns in every process that it forks, with what that is to be."""

    def __init__(self, address: str, starter: int) -> None:
        """`starter` is a descriptor whose end means that nobody is there to ask any more."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind("\0" + address)
        self._listening.listen(64)
        self._starter = starter
        self._watched = selectors.DefaultSelector()
        self._watched.register(self._listening, selectors.EVENT_READ)
        self._watched.register(starter, selectors.EVENT_READ)
        self._children: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the process

    def serve(self) -> dict[str, Any]:
        gc.collect()
        gc.freeze()  # pages that all share are not written to by a collector that marks what it sees
        while True:
            for key, _ in self._watched.select():
                if key.fileobj is self._listening:
                    connection = self._listening.accept()[0]
                    try:
                        request = self._fork(connection)
                    except (OSError, EOFError, struct.error):  # whoever asked has been killed meanwhile
                        connection.close()
                        continue
                    if request is not None:
                        return request
                elif key.fileobj == self._starter:
                    if not os.read(self._starter, 64):
                        os._exit(0)
                else:
                    self._tell(key.fd)

    def _fork(self, connection: socket.socket) -> dict[str, Any] | None:
        length, given, _, _ = socket.recv_fds(connection, 4, 16)
        (left,) = struct.unpack("!I", length)
        text = b""
        while len(text) < left:
            if not (part := connection.recv(left - len(text))):
                raise EOFError
            text += part
        request: dict[str, Any] = json.loads(text)
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            connection.close()
            self.leave()
            request["descriptors"] = list(zip(given, request["descriptors"], strict=True))
            return request
        for descriptor in given:
            os.close(descriptor)
        process = os.pidfd_open(pid)
        self._children[process] = (pid, connection)
        self._watched.register(process, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # whoever asked may be gone
            connection.sendall(struct.pack("!I", pid))
        return None

    def _tell(self, process: int) -> None:
        pid, connection = self._children.pop(process)
        self._watched.unregister(process)
        os.close(process)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):  # whoever asked may be gone
            connection.sendall(struct.pack("!I", status))
        connection.close()

    def leave(self) -> None:
        """In a process that is not the server: nothing of it stays open."""
        self._watched.close()
        self._listening.close()
        os.close(self._starter)
        for process, (_, asked) in self._children.items():
            os.close(process)
            asked.close()


def _become(request: dict[str, Any]) -> None:
    """Turn this fork into the process that was asked for, and run it to the end of its main module."""
    for received, wanted in _out_of_the_way(request["descriptors"]):
        os.dup2(received, wanted)
        os.set_inheritable(wanted, True)
        os.close(received)
    if request["session"]:
        os.setsid()
    for number in IGNORABLE:  # as whoever asked, and not as the server was started
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    words = [word for word in request["words"] if word != "-u"]
    os.environ.clear()  # before its memory is written over
    os.environ.update(request["environment"])
    _show(request["words"], request["environment"])
    os.chdir(request["directory"])
    tempfile.tempdir = None
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    if len(words) < len(request["words"]):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    by_path = words[1] != "-m"
    module, rest = (words[1], words[2:]) if by_path else (words[2], words[3:])
    first = str(Path(module).resolve().parent) if by_path else request["directory"]
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *more, *(path for path in sys.path if path != str(ROOT)), *([] if by_path else [str(ROOT)])]
    sys.argv[:] = [module, *rest]
    if module == "launch":
        _fork_trainers_too()
    if by_path:
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _out_of_the_way(descriptors: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Received descriptors moved above all that are wanted, so that none is written over before it is used."""
    above = max(wanted for _, wanted in descriptors) + 1
    moved = [(fcntl.fcntl(received, fcntl.F_DUPFD_CLOEXEC, above), wanted) for received, wanted in descriptors]
    for received, _ in descriptors:
        os.close(received)
    return moved


def _show(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write what a process was started with where /proc shows it, over what the server was started with."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    variables = [f"{key}={value}" for key, value in environment.items()]
    # arg_start, arg_end, env_start and env_end
    for first, last, texts in ((45, 46, words), (47, 48, variables)):
        start, room = int(fields[first]), int(fields[last]) - int(fields[first])
        text = b"".join(os.fsencode(text) + b"\0" for text in texts)
        ctypes.memmove(start, text[: room - 1].ljust(room, b"\0"), room)


def _fork_trainers_too() -> None:
    """Give this process, a launcher that does not run yet, a server of its own for the trainers that it will start."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.environ[ADDRESS] = _fresh_address()
    reader, writer = os.pipe()  # the launcher's end of it ends with the launcher
    serving = _Serving(os.environ[ADDRESS], reader)
    if os.fork() == 0:
        os.close(writer)
        os.setsid()
        _show(["forks", "of", "a", "launcher"], os.environ)
        with open(os.devnull, "r+b", buffering=0) as nothing:
            for number in (0, 1, 2):
                os.dup2(nothing.fileno(), number)
        _become(serving.serve())
        raise SystemExit
    serving.leave()
    started = subprocess.Popen

    def start(args: Sequence[str], **options: Any) -> Any:
        return (Fork if TRAINER in args[1:3] else started)(args, **options)

    vars(subprocess_handler)["Popen"] = start


if __name__ == "__main__":
    preload()
    _become(_Serving(sys.argv[1], 0).serve())
