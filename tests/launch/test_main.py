"""`python -m launch` as a command line: what it refuses before anything starts."""

from __future__ import annotations

import pytest

from launch.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "2", "--", "nokey=1"], "There is no option nokey"),
        (["--nproc", "3", "--", "parallel.dp_shard=2"], "does not divide the 3 process(es)"),
        (
            ["--nproc", "3", "--", "train.global_batch=7"],
            "train.global_batch=7 is not a multiple of train.micro_batch=2",
        ),
    ],
)
def test_what_does_not_compose_is_refused_before_anything_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.run", lambda *a: pytest.fail("it was started"))
    assert main(["local", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch: ") and message in error and error.count("\n") == 1


def test_no_processes_at_all_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--nproc", "0"]) == 2
    assert "launch.nproc=0 must be at least 1" in capsys.readouterr().err


def test_hydras_flags_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--cfg", "job"], ["--config-name", "config", "train.steps=3"], ["~model"]):
        status = main(["local", "--dry-run", "--", *words])
        out, error = capsys.readouterr()
        if words == ["~model"]:
            assert status == 2 and error.startswith("launch: ")
        else:
            assert status == 0 and out.rstrip().endswith(" ".join(words))
