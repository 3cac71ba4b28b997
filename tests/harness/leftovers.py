"""What a session of tests leaves behind: processes that still run, and files in shared memory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.harness.processes import alive

MARK = "EVERSHARD_TESTS"  # in the environment of everything that a session starts, whoever its parent is by then
SHARED = Path("/dev/shm")


class Before:
    """What there was when the session began."""

    def __init__(self) -> None:
        self.mark = f"{os.getpid()}-{os.urandom(4).hex()}"
        os.environ[MARK] = self.mark
        self.shared = shared_memory()

    def processes(self) -> list[str]:
        """The commands of living processes that this session started, this one apart."""
        mark = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if mark not in (entry / "environ").read_bytes().split(b"\0") or not alive(int(entry.name)):
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # it has ended, or is somebody else's
                continue
            # multiprocessing's resource tracker outlives its process by a moment, to unlink what that left.
            if "resource_tracker" not in command:
                found.append(f"{entry.name}: {command}")
        return found

    def memory(self) -> list[str]:
        """Names in shared memory that were not there, and that no living process maps: others use it meanwhile too."""
        new = shared_memory() - self.shared
        if not new:
            return []
        mapped = set()
        for entry in Path("/proc").glob("[0-9]*/maps"):
            try:
                mapped |= set(re.findall(r"/dev/shm/([^/\s]+)", entry.read_text(errors="replace")))
            except OSError:
                continue
        return sorted(new - mapped)


def shared_memory() -> set[str]:
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()
