"""torchrun's command for one machine of many, what is refused before it starts, and whose end explains the others'."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from launch.__main__ import main
from launch.torchrun import _check_way, find_cause, patient

TWO = ["torchrun", "--nodes", "1:2", "--endpoint", "localhost:29400", "--nproc", "2", "--dry-run"]


def test_a_machine_of_two_meets_the_other_and_gives_its_trainers_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TWO, "--", "elastic.grace_s=50", "run.name=x"]) == 0
    words = capsys.readouterr().out.split()
    for flag in ("--rdzv-endpoint=localhost:29400", "--rdzv-id=x", "--nnodes=1:2", "--nproc-per-node=2", "--tee=3"):
        assert flag in words
    assert "--shutdown-timeout=65" in words and "--log-dir=runs/x/logs" in words
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in words
    assert patient("TERM", 1)[0].count("SIGTERM") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "2"], "machines have no place to meet"),
        (["--nodes", "2", "--endpoint", "nowhere"], "is no HOST:PORT"),
        (["--nodes", "2", "--endpoint", "no-such-host.invalid:29400"], "cannot be found"),
        (["--nodes", "3", "--endpoint", "localhost:1", "--", "parallel.dp_shard=2"], "does not divide the 3"),
        (["--nodes", "2:4", "--endpoint", "localhost:1", "--", "parallel.dp_shard=2"], "does not divide the 3"),
        (["--", "resume=none"], "resume=none would start there again"),
        (["--log-dir", "/dev/null/logs", "--"], "--log-dir /dev/null/logs cannot be written"),
    ],
)
def test_what_cannot_meet_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torchrun", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("says", ["nothing", "something else"])
def test_a_port_that_is_taken_is_refused(
    says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.torchrun.PROBE_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        answering = threading.Thread(target=_answer if says != "nothing" else lambda _: None, args=(stranger,))
        answering.start()
        endpoint = f"127.0.0.1:{stranger.getsockname()[1]}"
        assert main(["torchrun", "--nodes", "2", "--endpoint", endpoint, "--", f"run.dir={tmp_path}"]) == 2
        stranger.shutdown(socket.SHUT_RDWR)
        answering.join(10)
    error = capsys.readouterr().err
    assert f"--endpoint {endpoint} is taken" in error and error.count("\n") == 1


def _answer(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            caller, _ = server.accept()
            with caller, contextlib.suppress(OSError):
                caller.sendall(b"220 mail.example.org\r\n")


@pytest.mark.usefixtures("processes")
def test_one_of_us_who_was_first_is_no_stranger() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _check_way(f"127.0.0.1:{store.port}")


@pytest.mark.usefixtures("long")
def test_a_host_out_of_reach_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_vain(*_: object, **__: object) -> socket.socket:
        tried.append(1)
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    tried: list[int] = []
    monkeypatch.setattr("launch.torchrun.MEET_S", 1.5)  # more than one attempt
    monkeypatch.setattr("socket.create_connection", in_vain)  # networks differ in what they do with an absent host
    assert main(["torchrun", "--nodes", "2", "--endpoint", "240.0.0.1:29400", "--", f"run.dir={tmp_path}"]) == 2
    assert len(tried) > 1
    error = capsys.readouterr().err
    assert (
        "--endpoint 240.0.0.1:29400 cannot be reached from here (No route to host)" in error and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("exitcodes", "cause"),
    [
        ({0: 1, 1: -9}, (1, -9)),  # rank 0 failed of losing rank 1
        ({0: -15, 1: 2}, (1, 2)),
        ({0: 1, 2: 1}, (0, 1)),
        ({0: 1, 1: 2}, (1, 2)),
        ({1: -11, 0: -15}, (1, -11)),
    ],
)
def test_the_cause_is_told_from_what_followed(exitcodes: dict[int, int], cause: tuple[int, int]) -> None:
    assert find_cause(exitcodes) == cause
