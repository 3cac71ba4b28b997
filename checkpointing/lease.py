"""Who is alive: lease files with a heartbeat, because locks of the kernel fail on shared filesystems.

A `Lease` makes its holder the one writer of a directory; a `Hold` keeps others from deleting a generation that is being
read or written. How a lease is taken, kept and lost is in `lease_protocol.py`; here that runs on a storage.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpointing import lease_protocol as protocol
from checkpointing.errors import CheckpointError, DamagedError, LeaseHeldError, NotFoundError
from checkpointing.lease_protocol import (
    EXPIRY_S,
    GUARD_S,
    HEARTBEAT_S,
    ClaimLostError,
    Create,
    Delete,
    HeldError,
    Now,
    Numbers,
    Put,
    ReadClaim,
    Steps,
    Verdict,
    WaitFor,
)
from checkpointing.small_files import SMALL_FILE_BYTES, retried
from checkpointing.storage import FileStorage, Storage

logger = logging.getLogger("checkpointing")

RELEASE_S = 10.0  # a disk that hangs for longer does not keep a process from ending


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: enough to tell on the same machine, at once, whether it still lives."""

    host: str
    boot_id: str
    pid_namespace: str  # of a container: pids of another one mean nothing here
    pid: int
    started: str  # the kernel's start time of the process, so that a recycled pid is not taken for it
    token: str
    where: str = ""  # the directory that it holds, which a copy of the lease does not lie in

    @staticmethod
    def this_process(where: str = "") -> Holder:
        pid = os.getpid()
        return Holder(*pid_space(), pid=pid, started=_start_time(pid) or "", token=secrets.token_hex(8), where=where)

    @property
    def machine(self) -> tuple[str, str, str]:
        return self.host, self.boot_id, self.pid_namespace

    @property
    def lives(self) -> bool:
        """Whether the process lives, which is one of this machine. One that may not be looked at does."""
        started = _start_time(self.pid)
        return started is None or started == self.started


class Lease:
    """A held lease: `check()`, before anything is written, raises once another process has it."""

    def __init__(self, storage: Storage, number: int, claim: bytes, since: float) -> None:
        self.storage, self.number, self.claim = storage, number, claim
        self._since = since  # it was ours at that time
        # Held open, which keeps its inode's number what it is on filesystems that make numbers up.
        self._place = os.open(storage.root, os.O_RDONLY | os.O_DIRECTORY) if isinstance(storage, FileStorage) else None
        self._lost = ""
        self._failure: Exception | None = None  # of the last look: the heartbeat goes on looking
        self._beats = 0
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls, storage: Storage, expiry_s: float = EXPIRY_S, waiting: Callable[[Holder | None], None] | None = None
    ) -> Lease:
        """Take the lease, from a dead holder too. `LeaseHeldError` if its holder lives.

        Whether a holder on this machine lives is seen at once; one elsewhere is watched for up to `expiry_s`, and
        `waiting` is called with it before that.
        """
        root = str(storage.root.resolve()) if isinstance(storage, FileStorage) else ""
        claim = json.dumps(asdict(Holder.this_process(root))).encode()
        try:
            number, since = _carry_out(
                protocol.acquire(claim, lambda content: judge(content, root), expiry_s), storage, waiting
            )
        except HeldError as held:
            other = _parse_holder(held.claim)
            who = f"process {other.pid} on {other.host}" if other else "another process"
            raise LeaseHeldError(f"{who} holds {storage}") from None
        lease = cls(storage, number, claim, since)
        try:
            lease.check(anew=True)  # the first beat, while there is room for it
        except BaseException:
            lease.release()
            raise
        return lease

    def check(self, *, anew: bool = False) -> None:
        """Raise `LeaseHeldError` once another process has the lease. Looks `anew`, or where the last look is long ago.

        `UnreadableError` or `OSError` where that cannot be told because the storage fails: nothing is lost then, and
        nothing may be written. That is said at once where it was the last look's answer, unless it is to look `anew`.
        """
        old = _clock() - self._since > GUARD_S
        if old and not anew and (failure := self._failure) is not None:
            raise failure
        if anew or self._lost or old:
            self._renew()

    def release(self) -> None:
        """Give it back. Where the storage fails others see that this process is dead, or that it does not beat."""
        self._stop.set()
        self._thread.join(RELEASE_S)
        with suppress(OSError, CheckpointError):
            if not self._lost and not self._thread.is_alive():
                _carry_out(protocol.release(self.number), self.storage)
        if self._place is not None and not self._thread.is_alive():
            os.close(self._place)
            self._place = None

    def _renew(self) -> None:
        with self._renewing:
            if not self._lost and self._place is not None and not _leads_to(self.storage, self._place):
                self._lost = f"{self.storage} was moved, deleted or replaced while this process held it"
            if not self._lost:
                self._beats += 1
                try:
                    beat = b"%016d" % self._beats  # each takes the place of the one before it
                    self._since = _carry_out(protocol.renew(self.number, self.claim, beat), self.storage)
                    self._failure = None
                except ClaimLostError:
                    self._lost = f"another process took over {self.storage} while this one did not respond"
                except (OSError, CheckpointError) as error:
                    self._failure = error
                    raise
        if self._lost:
            raise LeaseHeldError(self._lost)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self._renew()
            except LeaseHeldError:
                return
            except (OSError, CheckpointError):
                continue  # a filesystem that hiccups costs a beat
            except RuntimeError:
                return  # Python is ending, and starts no threads any more


def _leads_to(storage: Storage, directory: int) -> bool:
    """Whether a storage's path still leads to the directory that is open.

    Otherwise a beat would make it anew, and what this process has open would be written elsewhere.
    """
    assert isinstance(storage, FileStorage)
    try:
        return os.path.samestat(os.stat(storage.root), os.fstat(directory))
    except (FileNotFoundError, NotADirectoryError):
        return False


def still_holds(storage: Storage, number: int, claim: bytes) -> bool:
    """Whether no other process has claimed the directory since. For one that works for the holder, and only looks."""
    later = [_read(storage, protocol.claim_name(n)) for n in _numbers(storage) if n > number]
    return _read(storage, protocol.claim_name(number)) in (claim, None) and all(c == protocol.RELEASED for c in later)


def holder_of(storage: Storage) -> Holder | None:
    """Who holds the lease and lives, without taking it. One elsewhere is watched for two heartbeats."""
    if not (numbers := _numbers(storage)):
        return None
    content = _read(storage, protocol.claim_name(numbers[-1]))
    root = str(storage.root.resolve()) if isinstance(storage, FileStorage) else ""
    verdict, beat = judge(content, root), protocol.beat_name(numbers[-1])
    if verdict is Verdict.unknown:
        deadline, first = time.monotonic() + 2 * HEARTBEAT_S + 1, _read(storage, beat)
        while time.monotonic() < deadline and verdict is Verdict.unknown:
            time.sleep(0.2)
            verdict = Verdict.held if _read(storage, beat) != first else verdict
    return _parse_holder(content) if verdict is Verdict.held else None


def judge(content: bytes | None, where: str) -> Verdict:
    """Judge the holder of a directory by its claim."""
    if content == protocol.RELEASED:
        return Verdict.free
    if (holder := _parse_holder(content)) is None or holder.machine != pid_space():
        return Verdict.unknown
    return Verdict.held if holder.lives and not _is_copied(holder, where) else Verdict.free


def _is_copied(holder: Holder, where: str) -> bool:
    """Whether a living holder of this machine holds another directory, of which this one is a copy.

    Where the one it names is gone, it may be this one, moved: then it notices that, and ends.
    """
    try:
        return bool(holder.where and where) and not os.path.samefile(holder.where, where)
    except (OSError, ValueError):
        return False


def _carry_out(steps: Steps, storage: Storage, waiting: Callable[[Holder | None], None] | None = None) -> Any:
    answer: Any = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration as ended:
            return ended.value
        answer = None
        if isinstance(operation, Numbers):
            answer = _numbers(storage)
        elif isinstance(operation, ReadClaim):
            answer = _read(storage, operation.name)
        elif isinstance(operation, Create):
            answer = storage.create_if_absent(operation.name, operation.data)
        elif isinstance(operation, Put):
            storage.put(operation.name, [operation.data])
        elif isinstance(operation, Delete):
            with suppress(OSError):  # a claim with a lower number than another one says nothing any more
                storage.delete(operation.names)
        elif isinstance(operation, Now):
            answer = _clock()
        elif isinstance(operation, WaitFor):
            if waiting is not None:
                waiting(_parse_holder(operation.claim))
                waiting = None
            time.sleep(operation.seconds)


def _clock() -> float:
    """Seconds that go on while this process is stopped, and while its machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


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
        return holder.lives
    beat, now = _read(storage, f"{name}.beat"), time.monotonic()
    last, since = _last_beats.setdefault((str(storage), name), (beat, now))
    if beat != last:
        _last_beats[str(storage), name] = (beat, now)
        return True
    return now - since < EXPIRY_S


def _parse_holder(data: bytes | None) -> Holder | None:
    try:
        found = Holder(**json.loads(data or b""))
    except (ValueError, TypeError, RecursionError):
        return None  # absent, being written at this moment, or given back
    words = (found.host, found.boot_id, found.pid_namespace, found.started, found.token, found.where)
    known = all(isinstance(word, str) for word in words) and type(found.pid) is int and 0 < found.pid < 2**31
    return found if known else None


def _read(storage: Storage, name: str) -> bytes | None:
    try:
        nbytes = min(storage.list(name)[name], SMALL_FILE_BYTES)  # what is larger is no claim, and no beat
        return bytes(storage.read_ranges(name, [(0, nbytes)])[0])
    except (KeyError, NotFoundError, DamagedError):
        return None


def _numbers(storage: Storage) -> list[int]:
    """The numbers of all claims. Anything under such a name counts, a directory too: nobody can tell whose it is."""
    names = _names(storage.root) if isinstance(storage, FileStorage) else list(storage.list("lease-"))
    return sorted(int(found[1]) for name in names if (found := _CLAIM.fullmatch(name)))


_CLAIM = re.compile(r"lease-([0-9]{6,18})\.json", re.ASCII)


def _names(directory: Path) -> list[str]:
    try:
        return retried(directory, lambda: os.listdir(directory))
    except NotFoundError:
        return []


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


def _start_time(pid: int) -> str | None:
    """The start time of a living process in clock ticks since boot.

    Empty if it is dead, a zombie included; None where it lives and does not let itself be looked at.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # it lives, under another user
    try:
        # The command in parentheses may hold anything; the fields after it start with the state.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux, or one that hides the processes of others; or it ended right now
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "alive" if not Path("/proc/self/stat").exists() else None
    return "" if fields[0] in "ZX" else fields[19]
