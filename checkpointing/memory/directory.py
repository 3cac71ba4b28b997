"""The run's directory in memory: this user's alone, locked by its keeper, and cleared away with everything in it."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from checkpointing.errors import CheckpointError, first_few
from checkpointing.small_files import DRAFT

DEFAULT_MEMORY = Path(f"/dev/shm/evershard-{os.getuid()}")  # of all runs of this user
SECRET, LOCK, LOG = "keeper.secret", "keeper.lock", "keeper.log"
RELEASE = "keeper.version"  # of the protocol that the keeper at work speaks
SECRET_BYTES = 32
FINISHED = "finished"  # the run needs no memory any more
DELETE_AGAIN_S = (0.1, 1.0)  # before what could not be deleted is tried again
_GONE = ".gone-"  # what is being deleted
_START = "start-"  # a lock file of every start of the trainer; its ranks hold it while they live


def make_directory(root: Path) -> str:
    """Make the run's directory in memory, for this user alone; returns the secret in it that its processes share."""
    root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        root.mkdir(mode=0o700)
    if why := why_not_private(root):
        raise CheckpointError(f"{why}. Snapshots are private: choose another directory, or remove this one.")
    if not is_of_a_run(root) and (others := [p.name for p in root.iterdir() if not p.name.startswith((DRAFT, SECRET))]):
        raise CheckpointError(
            f"{root} holds {first_few(others)}, and was not made for snapshots, whose directory is deleted with all "
            "that is in it. Choose another directory, or move that away."
        )
    draft = root / f"{DRAFT}{secrets.token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(SECRET_BYTES // 2))
    try:
        os.link(draft, root / SECRET)  # the first one stays
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return read_secret(root)


def read_secret(root: Path) -> str:
    return (root / SECRET).read_text()


def why_not_private(root: Path) -> str:
    """The reason why a directory is not this user's alone; empty where it is.

    Others must be unable to put another one in its place, too: the directory above is this user's or root's, and where
    all may write there, as in /dev/shm, its sticky bit keeps them from renaming what is not theirs.
    """
    status, above = root.lstat(), root.parent.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{root} is not a directory"
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        return f"{root} is not this user's alone (owner {status.st_uid}, mode {status.st_mode & 0o777:o})"
    if above.st_uid not in (os.getuid(), 0) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
        return f"others may write into {root.parent} (owner {above.st_uid}, mode {above.st_mode & 0o777:o})"
    return ""


@contextmanager
def keeper_lock(root: Path) -> Iterator[IO[str] | None]:
    """Held by the one keeper of a directory as long as it lives; None where one is at work.

    The file says how many seconds the memory is kept for a run that does not come back.
    """
    with open(root / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield lock


def write_keep_s(root: Path, seconds: float) -> None:
    (root / LOCK).write_text(repr(seconds))  # in place, as it is what is locked; one that is cut short says KEEP_S


def is_of_a_run(root: Path) -> bool:
    """Whether a directory has the mark of one that was made here: nothing else is ever deleted."""
    try:
        status = (root / SECRET).lstat()
        marked = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_size == SECRET_BYTES
        return marked and stat.S_ISDIR(root.lstat().st_mode)
    except OSError:
        return False


def remove(root: Path) -> None:
    """Delete a run's directory. Renamed first, so that a trainer that comes back at this moment makes a new one."""
    if not is_of_a_run(root):
        return
    aside = root.parent / f"{_GONE}{secrets.token_hex(8)}"
    renamed = False
    for wait in (*DELETE_AGAIN_S, None):
        with suppress(OSError):
            if not renamed and root.exists():
                root.rename(aside)
            renamed = True  # once: a trainer that comes back makes the name anew
        _delete(aside)
        if wait is None or (renamed and not aside.exists()):
            break
        time.sleep(wait)
    if root.parent == DEFAULT_MEMORY:
        with suppress(OSError):  # other runs of this user are there
            root.parent.rmdir()


def _delete(root: Path) -> None:
    """The mark goes last: cut short, what is left can still be told."""
    with suppress(OSError):
        for path in list(root.iterdir()):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != SECRET:
                    path.unlink(missing_ok=True)
        if {path.name for path in root.iterdir()} - {SECRET}:
            return
        (root / SECRET).unlink(missing_ok=True)
        root.rmdir()


def clear_forgotten(directory: Path, own: str = "") -> list[str]:
    """Delete what runs of this user left in a directory, finished or kept for long enough, where no keeper lives.

    As after a keeper was killed with everything else, and its run never came back. Returns the names.
    """
    gone = []
    for path in directory.iterdir():
        if path.name != own and is_of_a_run(path):
            with suppress(OSError, ValueError):
                if path.stat().st_uid != os.getuid():
                    continue
                if path.name.startswith(_GONE):  # by one that was killed in the middle
                    _delete(path)
                elif (path / LOCK).exists() and _clear(path):
                    gone.append(path.name)
    return gone


def _clear(root: Path) -> bool:
    last = max(file.stat().st_mtime for file in root.rglob("*"))
    with keeper_lock(root) as lock:
        if lock is None:
            return False
        lock.seek(0)
        if (root / FINISHED).exists() or time.time() - last > float(lock.read() or KEEP_S):
            remove(root)
            return True
        return False


KEEP_S = 3600.0  # how long the memory stays when the run does not come back


def join_start(root: Path, session: str) -> IO[bytes]:
    """A file that a rank keeps open while it may write into arenas: the kernel tells by it whether the rank lives."""
    held = open(root / f"{_START}{session}", "wb")  # noqa: SIM115  # until the process ends, however it does
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def has_living_starts(root: Path, session: str = "") -> bool:
    """Whether ranks of a start live, of another one than `session`; forgets starts of which none does."""
    living = False
    for path in root.glob(f"{_START}*"):
        if path.name != f"{_START}{session}":
            with open(path, "rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    living = True
    return living
