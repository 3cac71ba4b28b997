"""torchrun's command for one machine of many, what is refused before it starts, and whose end explains the others'."""

from __future__ import annotations

import pytest

from launch.__main__ import main
from launch.torchrun import find_cause, patient

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
    ],
)
def test_what_cannot_meet_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["torchrun", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


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
