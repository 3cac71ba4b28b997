"""A forked process is what a started one would be: to itself, and to whoever asked for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.forks import ADDRESS, Fork, Server
from tests.harness.processes import alive, descendants, kill_tree, wait_for
from tests.harness.runs import SMALL, environment

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.smoke]

TELLS = """
import atexit, json, os, signal, sys, threading
atexit.register(lambda: print("left", flush=True))
print(json.dumps({
    "argv": sys.argv, "directory": os.getcwd(), "name": __name__, "first": sys.path[0], "input": sys.stdin.read(),
    "given": os.environ.get("GIVEN"), "file": __file__,
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler, "threads": threading.active_count(),
    "descriptors": sorted(int(n) for n in os.listdir("/proc/self/fd"))[:3], "leader": os.getsid(0) == os.getpid(),
}))
print("to stderr", file=sys.stderr)
if len(sys.argv) > 1: exec(sys.argv[1])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "tells.py"
    path.write_text(TELLS)
    return path


def both(words: list[str], **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """The same started and forked."""
    found = []
    for popen in (subprocess.Popen, Fork):
        with popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        ) as process:
            output, errors = process.communicate("what is said", timeout=60)
        found.append(subprocess.CompletedProcess([], process.returncode, output, errors))
    return found


@pytest.mark.parametrize("ignoring", [False, True])
def test_it_ignores_what_a_started_one_ignores(program: Path, ignoring: bool) -> None:
    """As of tests that a shell has started in the background, or nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignoring else signal.default_int_handler)
    try:
        started, forked = both([sys.executable, str(program)], env=environment())
    finally:
        signal.signal(signal.SIGINT, before)
    told = [json.loads(one.stdout.splitlines()[0])["interrupt"] for one in (started, forked)]
    assert told == [not ignoring, not ignoring]


@pytest.mark.parametrize("session", [False, True])
def test_it_sees_what_a_started_one_sees(program: Path, tmp_path: Path, session: bool) -> None:
    env = environment(GIVEN="this")
    started, forked = both([sys.executable, str(program)], cwd=tmp_path, env=env, start_new_session=session)
    assert json.loads(started.stdout.splitlines()[0]) == json.loads(forked.stdout.splitlines()[0])
    assert forked.stdout.splitlines()[1] == "left" and forked.stderr == "to stderr\n" and forked.returncode == 0
    other, _ = both([sys.executable, str(program), "pass"], cwd=tmp_path, env=environment(), start_new_session=session)
    assert json.loads(other.stdout.splitlines()[0]) != json.loads(started.stdout.splitlines()[0])


@pytest.mark.parametrize(
    ("code", "status"),
    [("sys.exit(3)", 3), ("sys.exit('why')", 1), ("1 / 0", 1), ("os._exit(75)", 75), ("os.kill(os.getpid(), 9)", -9)],
)
def test_it_ends_as_a_started_one_ends(program: Path, code: str, status: int) -> None:
    started, forked = both([sys.executable, str(program), code])
    assert started.returncode == forked.returncode == status
    assert started.stderr.splitlines()[-1] == forked.stderr.splitlines()[-1]


def test_a_module_is_run_as_one(tmp_path: Path) -> None:
    started, forked = both([sys.executable, "-m", "checkpointing", "ls", str(tmp_path)], env=environment())
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)
    assert forked.returncode == 2


def test_its_words_and_environment_are_in_proc_and_a_signal_ends_it(program: Path) -> None:
    words = [sys.executable, str(program), "import time; time.sleep(600)"]
    with Fork(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        assert [word.decode() for word in shown] == words
        environ = Path(f"/proc/{process.pid}/environ").read_bytes().rstrip(b"\0").split(b"\0")
        assert dict(os.fsdecode(one).split("=", 1) for one in environ) == dict(os.environ)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM and not alive(process.pid)


def test_descriptors_are_passed_under_their_numbers(program: Path) -> None:
    reader, writer = os.pipe()
    code = f"os.write({writer}, b'heard')"
    with Fork([sys.executable, str(program), code], stdin=subprocess.DEVNULL, stdout=2, pass_fds=[writer]) as process:
        os.close(writer)
        assert os.read(reader, 100) == b"heard" and process.wait(30) == 0
    os.close(reader)


def test_trainers_of_a_forked_launcher_live_below_it_and_die_with_it(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch", "local", "--nproc", "2", "--", *SMALL, "train.steps=100000"]
    with open(tmp_path / "log", "wb") as log:
        process = Fork(
            [*words, f"run.dir={tmp_path / 'run'}"], env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0), 60)
        below = descendants(process.pid)
        shown = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below]
        assert sum(b"trainer/__main__.py" in words for words in shown) == 2, (tmp_path / "log").read_text()
    finally:
        kill_tree(process.pid)
    assert process.wait(30) == -signal.SIGKILL and not any(map(alive, below))


def test_what_cannot_be_forked_is_refused() -> None:
    with pytest.raises(ValueError, match="can be forked"):
        Fork([sys.executable, "-c", "pass"])


def test_a_server_that_is_gone_ends_nothing_and_its_forks_are_told_as_killed(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, os.environ[ADDRESS])  # put back in the end
    server = Server()
    words = [sys.executable, str(program), "sys.stdin = open(0); sys.stdin.readline()"]
    process = Fork(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server.stop()
    assert alive(process.pid)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    process.stdin.close()  # type: ignore[union-attr]
