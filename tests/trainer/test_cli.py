"""`python -m trainer` as a command: statuses, one paragraph on stderr, and always this package."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import ROOT
from tests.harness.runs import SMALL, environment, trainer
from trainer import cli, run
from trainer.errors import Refused, TrainingFailed

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    """A directory with other packages of the same names, as installed ones may be."""
    for name in ("trainer", "checkpointing", "conf", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "__main__.py").write_text("print('DECOY')")
    return tmp_path


@pytest.mark.smoke
def test_from_the_project_it_is_ours_whatever_is_installed(decoy: Path) -> None:
    done = trainer(*SMALL, "dry_run=true", f"run.dir={decoy}/run", env=environment(PYTHONPATH=str(decoy)), started=True)
    assert done.returncode == 0 and "DECOY" not in done.stdout and "parameters" in done.stdout, done.stderr


def test_by_its_path_it_is_ours_from_anywhere(decoy: Path) -> None:
    for path in (ROOT / "trainer", ROOT / "trainer" / "__main__.py"):
        done = subprocess.run(
            [sys.executable, str(path), *SMALL, "dry_run=true"],
            cwd=decoy,
            env=environment(PYTHONPATH=str(decoy)),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and "DECOY" not in done.stdout and "parameters" in done.stdout, done.stderr


def test_the_launcher_starts_ours_from_anywhere(decoy: Path) -> None:
    # `launch` is ours by the order of the path, and the packages beside it must be too.
    (decoy / "launch" / "__init__.py").unlink()
    (decoy / "launch" / "__main__.py").unlink()
    (decoy / "launch").rmdir()
    env = environment(PYTHONPATH=os.pathsep.join([str(decoy), str(ROOT)]))
    arguments = ["local", "--nproc", "1", "--", *SMALL, "train.steps=1", f"run.dir={decoy / 'run'}"]
    done = trainer(*arguments, module="launch", cwd=decoy, env=env, started=True)
    assert done.returncode == 0 and "DECOY" not in done.stdout and "parameters" in done.stdout, done.stderr


def test_an_error_that_no_storage_gives_is_a_mistake_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(sys, "argv", ["trainer"])
    monkeypatch.setattr(run, "run", fail)
    with pytest.raises(OSError, match="Bad file"):
        cli.main()


@pytest.mark.smoke
def test_a_refusal_is_one_paragraph_and_status_2() -> None:
    done = trainer("train.stepz=1")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "trainer: There is no option train.stepz. Did you mean train.steps or train.seed or train.epochs?\n"
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        *((Refused("no"), 2), (TrainingFailed("nan"), 1), (KeyboardInterrupt(), 130)),
        *((OSError(errno.ESTALE, "Stale file handle", "/x"), 1), (OSError(errno.ENOSPC, "No space left"), 1)),
    ],
)
def test_statuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    def fail(config: object) -> int:
        raise error

    monkeypatch.setattr(sys, "argv", ["trainer"])
    monkeypatch.setattr(run, "run", fail)
    assert cli.main() == status
    assert capsys.readouterr().err.startswith("trainer: ")
    # A neighbour on the same machine waits for the first to say it, and says it in the end itself.
    monkeypatch.setenv("LOCAL_RANK", "1")
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(cli, "was_warned", lambda: False)
    assert cli.main() == status
    if status == 130:
        assert not waited and capsys.readouterr().err == ""
    else:
        said = capsys.readouterr().err
        assert waited == [cli.PATIENCE_S] and said.startswith("trainer: local rank 1: ") and said.count("\n") == 1
        assert str(getattr(error, "strerror", None) or error) in said
        # The launcher has ended it while it read its data: the first has spoken.
        monkeypatch.setattr(cli, "was_warned", lambda: True)
        assert cli.main() == status
        assert len(waited) == 1 and capsys.readouterr().err == ""


def test_the_local_rank_of_deepspeeds_launcher_is_dropped() -> None:
    kept = ["train.steps=1", "dry_run=true"]
    for stray in (["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"], []):
        assert cli.without_local_rank([kept[0], *stray, kept[1]]) == kept
    done = trainer("--local_rank=0", "train.stepz=1")
    assert done.returncode == 2 and done.stderr.startswith("trainer: There is no option train.stepz.")
