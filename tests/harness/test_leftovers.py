"""What a session leaves is found: by what it started, whoever its parent is, and by what shared memory holds."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.leftovers import SHARED, Before
from tests.harness.processes import ROOT, wait_for


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Before:
    monkeypatch.setenv("EVERSHARD_TESTS", os.environ["EVERSHARD_TESTS"])  # put back in the end
    return Before()


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_process_is_found_also_where_its_parent_is_gone(before: Before) -> None:
    assert before.processes() == []
    subprocess.run(["/bin/sh", "-c", "sleep 61 & true"], check=True, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_for(lambda: [one.endswith(" sleep 61") for one in before.processes()] == [True], 30)
    (found,) = before.processes()
    os.kill(int(found.partition(":")[0]), 9)
    wait_for(lambda: before.processes() == [], 30)


def test_shared_memory_is_found_unless_somebody_uses_it(before: Before) -> None:
    name = f"evershard-test-{os.getpid()}"
    path = SHARED / name
    path.write_bytes(b"x" * 4096)
    try:
        assert name in before.memory()
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 4096):
            assert name not in before.memory()
    finally:
        path.unlink()
    assert name not in before.memory()


LEAVES = """
import subprocess
def test_leaves(processes):
    subprocess.Popen(["sleep", "62"], start_new_session=True)
"""


@pytest.mark.smoke
@pytest.mark.usefixtures("processes")
def test_a_session_that_leaves_something_fails_and_names_it(tmp_path: Path) -> None:
    test = tmp_path / "test_leaves.py"
    test.write_text(LEAVES)
    words = ["-p", "tests.conftest", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "--leave-seconds", "1", str(test)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "1 passed" in done.stdout and "LEFT BEHIND" in done.stdout, done.stdout
    pid = int(done.stdout.partition("LEFT BEHIND: ")[2].partition(":")[0])
    os.kill(pid, 9)
