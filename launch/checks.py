"""Checks of a machine for a run: each says what it found, and what to mend."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool | None  # None: it may matter
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        word = {True: "ok", None: "note", False: "MEND"}[self.ok]
        return f"{word:5} {self.name:12} {self.found}" + (f". {self.remedy}" if self.remedy and not self.ok else "")


def memory() -> Check:
    """The memory that is free on this machine."""
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    remedy = "End what else runs here, or ask for more memory"
    return Check("memory", free > GIB, f"{free / GIB:.1f} GiB are free", remedy)


def shared_memory(path: str = "/dev/shm") -> Check:
    try:
        free = shutil.disk_usage(path).free
        probe = Path(path) / f"evershard-probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        return Check("shared memory", False, f"{path}: {error.strerror or error}", "Mount a tmpfs there")
    enough = True if free > GIB else None if free > 64 << 20 else False
    remedy = "Snapshots in memory need room for the state twice: give containers --shm-size, or checkpoint.memory.dir"
    return Check("shared memory", enough, f"{free / GIB:.2f} GiB of {path} are free", remedy)


def locked_memory() -> Check:
    most, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = most == resource.RLIM_INFINITY
    said = "unlimited" if unlimited else f"{most / GIB:.2f} GiB"
    return Check(
        "lock limit", unlimited or None, f"{said} (ulimit -l)", "GPUs copy slower without: ulimit -l unlimited"
    )


def disk(path: Path) -> list[Check]:
    """Check that files can be made there once and only once, reach the disk, and have this machine's time."""
    probe = path / f".probe-{uuid.uuid4().hex}"
    with contextlib.ExitStack() as left:
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            left.callback(lambda: probe.unlink(missing_ok=True))
            left.callback(os.close, file)
            os.write(file, b"x" * 4096)
            began = time.perf_counter()
            os.fsync(file)
            synced = time.perf_counter() - began
            directory = os.open(path, os.O_RDONLY)
            left.callback(os.close, directory)
            os.fsync(directory)
        except OSError as error:
            return [
                Check("disk", False, f"{path}: {error.strerror or error}", "Make it writable, or name another --dir")
            ]
        once = False
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            once = True
        skew = abs(os.stat(probe).st_mtime - time.time())
        free = shutil.disk_usage(path).free
    return [
        Check("disk", free > GIB, f"{free / GIB:.1f} GiB are free in {path}", "Make room"),
        Check("exclusive", once, "a file is created once" if once else "a file is created twice", "Leases need O_EXCL"),
        Check("fsync", synced < 1 or None, f"{1000 * synced:.1f} ms for 4 KiB", "Saves are slow on this disk"),
        Check("clock", skew < 5 or None, f"{skew:.1f} s from the file system's", "Set this machine's clock (NTP)"),
    ]


def visible(directory: Path, token: str, rank: int, size: int, seconds: float = 30) -> Check:
    """Check that what every machine of `size` writes there is seen by this one, as checkpoints must be."""
    own = [directory / f".seen-{token}-{number}" for number in range(size)]
    remedy = "Runs need a directory that all machines share"
    try:
        own[rank].write_text(str(rank), encoding="utf-8")
        deadline = time.monotonic() + seconds
        while (absent := [n for n, path in enumerate(own) if not path.exists()]) and time.monotonic() < deadline:
            os.listdir(directory)  # some file systems look again only then
            time.sleep(0.1)
    except OSError as error:
        return Check("shared", False, f"{directory}: {error.strerror or error}", remedy)
    if absent:
        return Check("shared", False, f"what machines {absent} write to {directory} is not seen", remedy)
    # The others may still look.
    gone = [directory / f".seen-{token}-{number}-done" for number in range(size)]
    gone[rank].touch()
    if rank == 0:
        while not all(path.exists() for path in gone) and time.monotonic() < deadline:
            time.sleep(0.05)
        for path in [*own, *gone]:
            path.unlink(missing_ok=True)
    return Check("shared", True, f"{size} machines see each other's files in {directory}")


def ports() -> Check:
    """Check that processes of this machine can reach each other under its name."""
    name = socket.gethostname()
    try:
        with socket.create_server(("", 0)) as server, socket.create_connection((name, server.getsockname()[1]), 5):
            return Check("ports", True, f"{name} reaches itself")
    except OSError as error:
        remedy = f"Put {name} into /etc/hosts, or open its ports to itself"
        return Check("ports", False, f"{name} does not reach itself: {error.strerror or error}", remedy)


def devices(wanted: int = 0) -> list[Check]:
    """There are as many GPUs as are wanted, and every one computes; and what processes talk over."""
    import torch
    import torch.distributed as dist

    found = [Check("torch", True, f"torch {torch.__version__}")]
    if wanted:
        there = torch.cuda.device_count()
        found.append(Check("GPUs", there >= wanted, f"{there} of {wanted} are seen", "Look at `nvidia-smi` there"))
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            ones = torch.ones(256, 256, device=f"cuda:{index}")
            right = float((ones @ ones).sum()) == 256.0**3
            found.append(Check(f"cuda:{index}", right, f"{name} computes" if right else f"{name} computes wrongly"))
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            found.append(
                Check(f"cuda:{index}", False, f"{name}: {said}", "Reset it, or hide it by CUDA_VISIBLE_DEVICES")
            )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    has = dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available()
    where = "for GPUs" if backend == "nccl" else "no GPU is seen, so the CPU trains"
    found.append(Check("backend", has, f"{backend}, {where}", "Install a torch that has it"))
    return found


def command(line: str) -> Check:
    """One of the user's own."""
    try:
        done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=60)
        said = (done.stderr or done.stdout).strip().splitlines()
        return Check(
            "command", done.returncode == 0, f"{line}: status {done.returncode}" + (f": {said[-1]}" if said else "")
        )
    except subprocess.TimeoutExpired:
        return Check("command", False, f"{line}: no answer in 60 s")


def of_a_machine(directory: Path, own: str = "", gpus: int = 0) -> list[Check]:
    """The checks before every job, in some seconds."""
    found = [memory(), shared_memory(), *disk(directory), ports(), *devices(gpus)]
    return [*found, command(own)] if own else found


def failed(checks: Sequence[Check]) -> str:
    """The failed checks in one line, with their mends; empty where all is well."""
    return "; ".join(f"{one.name}: {one.found}" for one in checks if one.ok is False)
