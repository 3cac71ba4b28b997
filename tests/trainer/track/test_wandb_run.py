"""wandb: offline without an account, the same run after a resume, and never in the way."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb

from trainer.track.wandb_run import WandbRun, unheard


@pytest.fixture(autouse=True)
def _no_service_is_left() -> Iterator[None]:
    yield
    wandb.teardown()  # ends with the process otherwise, which here is pytest's


def start(directory: Path, run_id: str = "abc12345") -> WandbRun:
    return WandbRun("project", "name", run_id, directory, {"train": {"steps": 3}})


def test_an_offline_run_is_written_into_the_run_directory(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (2, 3, 4)):  # a resume rolls back: the same id again
        run = start(tmp_path)
        for step in steps:
            run.step({"step": step, "loss": 1.0, "sample_ids": list(range(1000))})
        run.close(0)
    kept = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert kept and all("-abc12345" in name for name in kept)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_the_step_is_an_ordinary_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []

    class Fake:
        summary: ClassVar[dict[str, int]] = {}

        def define_metric(self, name: str, step_metric: str) -> None:
            logged.append((name, step_metric))

        def log(self, row: dict[str, Any], **options: Any) -> None:
            assert not options  # wandb's own step drops rows that go back
            logged.append(row)

        def finish(self, exit_code: int) -> None:
            logged.append(exit_code)

    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Fake())
    run = WandbRun("project", "name", "abc12345", tmp_path, {}, restarts=3)
    run.step({"step": 7, "loss": 1.0, "sample_ids": [1]})
    run.close(1)
    assert logged == [("*", "step"), {"step": 7, "loss": 1.0}, 1]
    assert Fake.summary == {"restarts": 3}
    assert asked["id"] == "abc12345" and asked["resume"] == "allow" and asked["mode"] == "offline"


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    class Broken:
        summary: ClassVar[dict[str, int]] = {}

        def __getattr__(self, name: str) -> Any:
            def act(*arguments: Any, **options: Any) -> None:
                if name == where:
                    raise OSError("the server is gone")

            return act

    def init(**options: Any) -> Broken:
        if where == "init":
            raise OSError("the server is gone")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING):
        run = start(tmp_path)
        for step in range(3):
            run.step({"step": step})
        run.close(0)
    assert [r.message for r in caplog.records] == [
        "wandb failed and is off for the rest of this run: OSError: the server is gone"
    ]


@pytest.mark.parametrize(("known", "mode"), [(True, "online"), (False, "offline")])
def test_online_only_with_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool, mode: str) -> None:
    monkeypatch.delenv("WANDB_MODE")
    asked: dict[str, Any] = {}

    class Fake:
        summary: ClassVar[dict[str, int]] = {}

        def define_metric(self, *arguments: Any, **options: Any) -> None: ...

    monkeypatch.setattr(wandb, "login", lambda prompt: known)
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Fake())
    start(tmp_path)
    assert asked["mode"] == mode


def test_what_is_started_meanwhile_does_not_hear_the_schedulers_signals() -> None:
    """And this process does, afterwards."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with unheard(signal.SIGTERM, signal.SIGUSR1):
            shielded = subprocess.Popen(["sleep", "60"])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == []
        assert heard == [signal.SIGUSR1]
        open_ = subprocess.Popen(["sleep", "60"])
        for process in (shielded, open_):
            process.send_signal(signal.SIGUSR1)
        assert open_.wait(10) == -signal.SIGUSR1  # the control
        assert shielded.poll() is None
        shielded.kill()
        shielded.wait(10)
    finally:
        signal.signal(signal.SIGUSR1, before)
