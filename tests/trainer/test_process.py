"""A process ends with its status, after exit handlers and before the teardown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import ROOT

pytestmark = pytest.mark.usefixtures("processes")


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("ending", "status"), [("lambda: 3", 3), ("lambda: 1 / 0", 1), ("lambda: sys.exit(2)", 2)])
def test_a_process_ends_with_its_status_after_exit_handlers_and_before_the_teardown(ending: str, status: int) -> None:
    script = f"""
import atexit, sys
from os import write
from trainer.process import run_as_process

class Late:
    def __del__(self, write=write):
        write(1, b"torn down")

kept = Late()

def main():
    atexit.register(print, "handled")
    return ({ending})()

run_as_process(main)
"""
    done = run(script)
    assert (done.returncode, done.stdout) == (status, "handled\n"), done.stderr
    assert ("ZeroDivisionError" in done.stderr) == ("/ 0" in ending)
    # The control: an ordinary end would have torn it down.
    script = script.replace("run_as_process(main)", "main()")
    done = run(script)
    assert "torn down" in done.stdout


WORDY = """
import logging, sys
from trainer.process import run_as_process

def main():
    logging.basicConfig()
    for number in range(3000):
        print("step", number, flush=number % 2 == 0)
    print("\\udc80 \u2014")
    print("why", file=sys.stderr)
    logging.getLogger("x").warning("a warning")
    open(sys.argv[1], "w").write("done")
    return 3

run_as_process(main)
"""


@pytest.mark.parametrize("where", ["full", "closed pipe", "ascii"])
def test_output_that_goes_nowhere_ends_nothing(where: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    target = os.open("/dev/full" if where == "full" else os.devnull, os.O_WRONLY) if where != "closed pipe" else writer
    done = subprocess.run(
        [sys.executable, "-c", WORDY, str(tmp_path / "done")],
        cwd=ROOT,
        stdout=target,
        stderr=target,
        env={**os.environ, **({"PYTHONIOENCODING": "ascii"} if where == "ascii" else {})},
        timeout=60,
    )
    assert done.returncode == 3 and (tmp_path / "done").read_text() == "done"
    for end in {target, writer}:
        os.close(end)


THREADS = """
import sys, threading
from torch.distributed import TCPStore
from trainer.process import run_as_process

def main():
    store = TCPStore("127.0.0.1", 0, is_master=True)
    store.set("key", "value")
    def work():
        while True:
            store.get("key")
    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    return 75

run_as_process(main)
"""


@pytest.mark.smoke
def test_threads_in_cpp_do_not_abort_it() -> None:
    done = run(THREADS)
    assert (done.returncode, done.stderr) == (75, "")
    # The control: an ordinary end. Whether a thread wants something of Python meanwhile is chance, but not ten times.
    plain = THREADS.replace("run_as_process(main)", "sys.exit(main())")
    assert any(run(plain).returncode == -6 for _ in range(10))


@pytest.mark.parametrize("module", ["trainer", "launch"])
def test_commands_end_like_that(module: str) -> None:
    done = run(
        "import runpy, trainer.process\n"
        "trainer.process.run_as_process = lambda main: print('as a process', main.__name__)\n"
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    assert done.stdout == "as a process main\n", done.stderr
