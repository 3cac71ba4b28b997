"""The keeper as a step of its own: in the run's directory in memory, and found there by the trainers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpointing.memory.directory import SECRET
from tests.checkpointing.memory.keepers import answers
from tests.harness.processes import ROOT, kill_tree, wait_for
from trainer.compose import compose
from trainer.resume import MEMORY_ID, memory_directory

pytestmark = pytest.mark.usefixtures("processes")


def test_it_listens_and_signals_for_the_trainers_do_not_end_it(tmp_path: Path) -> None:
    shared = Path("/dev/shm") / f"evershard-keeper-{os.getpid()}"
    overrides = [f"run.dir={tmp_path}", "checkpoint.memory.every=1", f"checkpoint.memory.dir={shared}"]
    keeper = [sys.executable, "-m", "launch.keeper", *overrides]
    process = subprocess.Popen(keeper, cwd=ROOT, env={**os.environ, "SLURM_PROCID": "0"})
    try:
        wait_for(lambda: (tmp_path / MEMORY_ID).exists(), 60)
        root = memory_directory(compose(overrides))
        assert root is not None
        wait_for(lambda: answers(root), 60)
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(signum)
        # One on a second task of the same machine ends at once, and leaves the first at work.
        assert subprocess.run(keeper, cwd=ROOT, env={**os.environ, "SLURM_PROCID": "1"}, timeout=60).returncode == 0
        assert process.poll() is None and answers(root)
        secret = root / SECRET
        assert secret.stat().st_mode & 0o077 == 0
        assert secret.read_text().strip() not in Path(f"/proc/{process.pid}/cmdline").read_text()
    finally:
        kill_tree(process.pid)
        process.wait(10)
        shutil.rmtree(shared, ignore_errors=True)
