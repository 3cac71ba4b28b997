"""The provenance of a run, left in its directory when its job is handed in: the place may have changed by its start."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from launch.command import ROOT
from launch.options import Call
from trainer.errors import Refused
from trainer.options.stored import as_yaml


def leave_behind(call: Call) -> None:
    """Write configuration, code and environment into `launch/` of the run directory."""
    home = Path(call.config.run.dir).absolute() / "launch"
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.yaml").write_text(as_yaml(call.config), encoding="utf-8")
        (home / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
        revision, difference = code(ROOT)
        (home / "revision").write_text(revision + "\n", encoding="utf-8")
        (home / "code.diff").write_bytes(difference)
    except OSError as error:
        raise Refused(
            f"{home} cannot be written: {error.strerror or error}. Make it writable, or type run.dir=DIRECTORY with "
            "one that can."
        ) from None


def code(root: Path) -> tuple[str, bytes]:
    """The revision of the repository and what differs from it; where there is none, the release."""
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, check=True, timeout=30)
        status = subprocess.run(["git", "diff", "HEAD"], cwd=root, capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        try:
            return f"release {importlib.metadata.version('evershard')}, no repository", b""
        except importlib.metadata.PackageNotFoundError:
            return "no repository", b""
    return revision.stdout.decode().strip(), status.stdout


def environment() -> dict[str, object]:
    """Facts of this machine and Python. Variables are left out unless they say how things are computed: secrets."""
    telling = ("CUDA", "NCCL", "OMP", "MKL", "TORCH", "PYTORCH", "GLOO", "DS_", "LOADEDMODULES", "HF_HOME")
    secret = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    shown = {
        key: value
        for key, value in sorted(os.environ.items())
        if key.startswith(telling) and not any(word in key for word in secret)
    }
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "time": time.time(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": sys.version,
        "packages": dict(sorted(packages.items())),
        "variables": shown,
    }
