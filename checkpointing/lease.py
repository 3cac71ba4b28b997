"""Who is alive: lease files with a heartbeat, because locks of the kernel fail on shared filesystems.

A `Lease` makes its holder the one writer of a directory; a `Hold` keeps others from deleting a generation that is being
read or written.

Leases are numbered and created exclusively, so of two processes that both take over a dead one only one succeeds,
and a holder that was only asleep finds out that it was replaced.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpointing.errors import CheckpointError, LeaseHeldError
from checkpointing.storage import Storage

logger = logging.getLogger("checkpointing")

HEARTBEAT_S = 5.0
EXPIRY_S = 30.0  # a holder on another machine that has not beaten for this long is dead


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: enough to tell on the same machine, at once, whether it still lives."""

    host: str
    boot_id: str
    pid_namespace: str  # of a container: pids of another one mean nothing here
    pid: int
    started: str  # the kernel's start time of the process, so that a recycled pid is not taken for it
    token: str

    @staticmethod
    def this_process() -> Holder:
        pid = os.getpid()
        return Holder(*pid_space(), pid=pid, started=_start_time(pid), token=secrets.token_hex(8))

    @property
    def machine(self) -> tuple[str, str, str]:
        return self.host, self.boot_id, self.pid_namespace


class Lease:
    """A held lease. `release()` gives it back; `check()` raises if another process took it over meanwhile."""

    def __init__(self, storage: Storage, number: int, holder: Holder) -> None:
        self._storage, self._number, self._holder = storage, number, holder
        self._lost = False
        self._beaten = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, storage: Storage, expiry_s: float = EXPIRY_S) -> Lease:
        """Take the lease, from a dead holder too. `LeaseHeldError` if its holder lives.

        Whether a holder on this machine lives is seen at once; one elsewhere is watched for up to `expiry_s`.
        """
        holder = Holder.this_process()
        while True:
            numbers = _numbers(storage)
            if numbers and (other := _living_holder(storage, numbers[-1], expiry_s)):
                raise LeaseHeldError(f"process {other.pid} on {other.host} holds {storage}")
            number = numbers[-1] + 1 if numbers else 1
            if storage.create_if_absent(_name(number), json.dumps(asdict(holder)).encode()):
                if _numbers(storage)[-1] > number:  # others came between the look and the creation, and are ahead
                    storage.delete([_name(number)])
                    continue
                for dead in numbers:
                    storage.delete([_name(dead), _beat_name(dead)])
                return cls(storage, number, holder)

    def check(self) -> None:
        """Raise `LeaseHeldError` unless this process still holds the lease. Read anew: call it before writing."""
        if not self._lost and time.monotonic() - self._beaten > EXPIRY_S:
            raise LeaseHeldError(
                f"the lease in {self._storage} could not be renewed for {EXPIRY_S:.0f} s; another process may hold it"
            )
        if self._lost or not self._is_ours():
            raise LeaseHeldError(f"another process took over {self._storage} while this one did not respond")

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._is_ours():
            self._storage.delete([_name(self._number), _beat_name(self._number)])

    def _is_ours(self) -> bool:
        # The token as well: numbers start again after a lease was given back.
        current = _read_holder(self._storage, self._number)
        ours = current is not None and current.token == self._holder.token
        return ours and max(_numbers(self._storage), default=0) == self._number

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if not self._is_ours():
                    self._lost = True
                    return
                count += 1
                self._storage.put(_beat_name(self._number), [str(count).encode()])
                self._beaten = time.monotonic()
            except (OSError, CheckpointError):
                continue  # a filesystem that hiccups costs a beat; one that stays away lets the lease expire


def holder_of(storage: Storage) -> Holder | None:
    """Who holds the lease and lives, without taking it. One elsewhere is watched for two heartbeats."""
    numbers = _numbers(storage)
    return _living_holder(storage, numbers[-1], 2 * HEARTBEAT_S + 1) if numbers else None


class Hold:
    """Keeps a generation from being deleted while this process reads or writes it. A context manager.

    `purpose` is a word: "read" or "write".
    """

    def __init__(self, storage: Storage, generation: str, purpose: str) -> None:
        holder = Holder.this_process()
        self._storage = storage
        self._name = f"{HOLDS}{generation}.{purpose}-{holder.token}"
        storage.create_if_absent(f"{self._name}.json", json.dumps(asdict(holder)).encode())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="hold-heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError, CheckpointError):  # it is dead from now on; whoever clears up deletes what is left
            self._storage.delete([f"{self._name}.beat", f"{self._name}.json"])

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(HEARTBEAT_S):
            count += 1
            with suppress(OSError, CheckpointError):
                self._storage.put(f"{self._name}.beat", [str(count).encode()])


def hold(storage: Storage, generation: str) -> AbstractContextManager[object]:
    """Keep a generation while it is read. To be taken before COMMIT is looked for.

    Then either who deletes it sees the hold, or the reader sees that COMMIT is gone.
    """
    try:
        return Hold(storage, generation, "read")
    except OSError as error:  # a checkpoint that this user may only read
        logger.warning("%s is read without a hold (%s): nothing keeps it from being deleted", generation, error)
        return nullcontext()


HOLDS = "hold-"  # in the directory itself: one of their own would come and go while others create in it
_last_beats: dict[tuple[str, str], tuple[bytes | None, float]] = {}  # of holds elsewhere: the beat, and since when


def held_generations(storage: Storage, purpose: str = "") -> set[str]:
    """The generations that a living process holds (for one purpose, or any). Forgets holds of dead ones.

    Whether a process of this machine lives is seen at once. One elsewhere counts as living until its beat has not
    changed for `EXPIRY_S` between two calls of this function, which does not wait.
    """
    found = set()
    names = storage.list(HOLDS)
    for path in names:
        name, _, suffix = path.rpartition(".")
        if suffix != "json":
            if suffix == "beat" and f"{name}.json" not in names:
                storage.delete([path])  # left by a process that died while it let go
            continue
        if not _lives(storage, name):
            storage.delete([f"{name}.beat", f"{name}.json"])
            continue
        generation, _, what = name.removeprefix(HOLDS).partition(".")
        if what.startswith(purpose):
            found.add(generation)
    return found


def _lives(storage: Storage, name: str) -> bool:
    holder = _parse_holder(_read(storage, f"{name}.json"))
    if holder and holder.machine == pid_space():
        return _start_time(holder.pid) == holder.started
    beat, now = _read(storage, f"{name}.beat"), time.monotonic()
    last, since = _last_beats.setdefault((str(storage), name), (beat, now))
    if beat != last:
        _last_beats[str(storage), name] = (beat, now)
        return True
    return now - since < EXPIRY_S


def _living_holder(storage: Storage, number: int, expiry_s: float) -> Holder | None:
    """Whoever holds this lease, or None where it is dead or gone."""
    holder = _read_holder(storage, number)
    if holder and holder.machine == pid_space():
        return holder if _start_time(holder.pid) == holder.started else None
    deadline, first = time.monotonic() + expiry_s, _read(storage, _beat_name(number))
    while time.monotonic() < deadline:
        holder = _read_holder(storage, number)
        if holder is None and _read(storage, _name(number)) is None:
            return None
        if holder and _read(storage, _beat_name(number)) != first:
            return holder
        time.sleep(min(0.2, expiry_s / 10))
    return None


def _read_holder(storage: Storage, number: int) -> Holder | None:
    return _parse_holder(_read(storage, _name(number)))


def _parse_holder(data: bytes | None) -> Holder | None:
    try:
        return Holder(**json.loads(data or b""))
    except (ValueError, TypeError):
        return None  # absent, or being written at this moment


def _read(storage: Storage, name: str) -> bytes | None:
    try:
        return bytes(storage.read_ranges(name, [(0, storage.list(name)[name])])[0])
    except (KeyError, CheckpointError):
        return None


def _numbers(storage: Storage) -> list[int]:
    names = (name.removeprefix("lease-").removesuffix(".json") for name in storage.list("lease-"))
    return sorted(int(name) for name in names if name.isdigit())


def _name(number: int) -> str:
    return f"lease-{number:06d}.json"


def _beat_name(number: int) -> str:
    return f"lease-{number:06d}.beat"


def this_machine() -> tuple[str, str]:
    """Host and boot: names alone are not always given once."""
    try:
        return socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname(), "unknown"


def pid_space() -> tuple[str, str, str]:
    """Where a pid names one process: host, boot and pid namespace."""
    try:
        return *this_machine(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return *this_machine(), ""


def _start_time(pid: int) -> str:
    """The start time of a living process in clock ticks since boot; empty if it is dead, a zombie included."""
    if not Path("/proc/self/stat").exists():  # not Linux: whether it lives is all that can be told
        return _alive(pid)
    try:
        # The command in parentheses may hold anything; the fields after it start with the state.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _alive(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it lives, under another user
    return "alive"
