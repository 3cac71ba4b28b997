"""wandb: offline without an account, the same run after a resume, and never in the way."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from tests.harness.ports import free_port
from tests.harness.processes import wait_for
from trainer.compose import compose
from trainer.errors import Refused
from trainer.track import wandb_run
from trainer.track.tracker import where_figures_go
from trainer.track.wandb_run import LOGGED, WandbRun, unheard


@pytest.fixture(autouse=True)
def _no_service_is_left() -> Iterator[None]:
    yield
    wandb.teardown()  # ends with the process otherwise, which here is pytest's


def start(directory: Path, run_id: str = "abc12345") -> WandbRun:
    return WandbRun("project", "name", run_id, directory, {"train": {"steps": 3}})


def another_second() -> None:
    """wandb names its directories by it, and a resume takes longer than one."""
    now = int(time.time())
    wait_for(lambda: int(time.time()) > now, 5)


def log_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format after a header of seven bytes: blocks of 32 KiB, records whole or in parts."""
    position, whole = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # what is left of a block is padding
            position += 32768 - position % 32768
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def told(directory: Path, steps: list[int]) -> bool:
    """Whether those steps are told in the end: wandb's own process may write after a run is closed."""
    with contextlib.suppress(AssertionError):
        wait_for(lambda: steps_told(directory) == steps, 20)
    return steps_told(directory) == steps


def steps_told(directory: Path) -> list[int]:
    """By the files that wandb sends later."""
    found = []
    for path in directory.glob("wandb/offline-run-*/*.wandb"):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                found.append(int(items["step"]))
    return sorted(found)


@pytest.mark.usefixtures("processes")
def test_an_offline_run_is_written_into_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in ((1, 2, 3), (2, 3, 4)):  # a resume rolls back: the same id again
        another_second()
        run = start(tmp_path)
        for step in steps:
            run.step({"step": step, "loss": 1.0, "sample_ids": list(range(1000))})
        run.close(0)
    assert told(tmp_path, [1, 2, 3, 4])  # each once
    (tmp_path / "wandb" / LOGGED).unlink()  # the control
    another_second()
    run = start(tmp_path)
    run.step({"step": 4, "loss": 1.0})
    run.close(0)
    assert told(tmp_path, [1, 2, 3, 4, 4])
    assert f"wandb sync {tmp_path}/wandb/offline-run-*-abc12345" in capsys.readouterr().out
    kept = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert kept and all("-abc12345" in name for name in kept)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.usefixtures("processes")
def test_what_is_computed_anew_is_told_again(tmp_path: Path) -> None:
    """After a rollback with other settings, which gives other numbers."""
    for anew, steps in ((None, (1, 2, 3)), (1, (2, 3, 4))):
        another_second()
        run = WandbRun("project", "name", "abc12345", tmp_path, {}, anew=anew)
        for step in steps:
            run.step({"step": step, "loss": 1.0})
        run.close(0)
    assert told(tmp_path, [1, 2, 2, 3, 3, 4])


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
    run.sample(7, "<p>", "text")
    run.close(1)
    page = logged.pop(2)
    assert page["step"] == 7 and page["sample"].html.endswith("<pre>&lt;p&gt;<b>text</b></pre>")
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

    monkeypatch.setattr(wandb_run, "_why_out_of_reach", lambda: "" if known else pytest.fail("nobody asked for that"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / ("netrc" if known else "none")))
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Fake())
    start(tmp_path)
    assert asked["mode"] == mode


def test_a_mode_that_wandb_does_not_know_is_refused_with_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(Refused, match="WANDB_MODE=sometimes is none of online, offline"):
        wandb_run.where_it_goes(tmp_path)


def test_without_a_home_directory_it_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])
    assert wandb_run.chosen_mode() == "offline"


def test_the_plan_says_where_figures_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_MODE")
    words = [f"run.dir={tmp_path}", "tracking=wandb"]
    assert where_figures_go(compose(words)) == f"wandb, offline, in {tmp_path}/wandb"
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://w.example")
    assert "online: figures, texts and the configuration go to https://w.example" in where_figures_go(compose(words))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert where_figures_go(compose(words)) == "wandb, disabled"
    assert where_figures_go(compose([words[0], "tracking=tensorboard"])) == f"tensorboard, in {tmp_path}/tensorboard"
    assert where_figures_go(compose([words[0], "tracking=none"])) == ""


def test_the_server_is_the_one_that_somebody_logged_in_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine w.example login user password " + "a" * 40)
    assert wandb_run.chosen_mode() == "offline"
    (tmp_path / "settings").write_text("[default]\nbase_url = https://w.example\n")
    assert wandb_run.chosen_mode() == "online" and "https://w.example" in wandb_run.where_it_goes(tmp_path)


@pytest.mark.usefixtures("processes")
def test_with_a_key_and_no_network_the_figures_are_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    run = start(tmp_path)
    run.step({"step": 1, "loss": 1.0})
    run.close(0)
    assert told(tmp_path, [1])
    assert "cannot be reached (Connection refused)" in caplog.text and "wandb failed" not in caplog.text
    assert "`wandb sync " in capsys.readouterr().out


def test_a_server_that_turns_it_away_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb_run, "_why_out_of_reach", lambda: "")
    asked = []

    class Fake:
        summary: ClassVar[dict[str, int]] = {}

        def define_metric(self, *arguments: Any, **options: Any) -> None: ...

    def init(**options: Any) -> Fake:
        asked.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no such account")
        return Fake()

    monkeypatch.setattr(wandb, "init", init)
    start(tmp_path)
    assert asked == ["online", "offline"] and "keeps the figures for `wandb sync`: no such account" in caplog.text


@pytest.mark.usefixtures("processes")
def test_what_is_started_meanwhile_does_not_hear_the_schedulers_signals() -> None:
    """And this process does, afterwards."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with unheard(signal.SIGTERM, signal.SIGUSR1):
            shielded = subprocess.Popen(["sleep", "60"])
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # this thread: others have not shut it out
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
