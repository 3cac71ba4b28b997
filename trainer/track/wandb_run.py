"""Weights & Biases, offline without an account. Whatever goes wrong with it, training goes on."""

from __future__ import annotations

import configparser
import html
import logging
import netrc
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from checkpointing.small_files import read_text
from trainer.errors import Refused
from trainer.track.guarded import Guarded

logger = logging.getLogger(__name__)

REACH_S = 5.0  # for the server to answer
LOGGED = "logged"  # in wandb's directory: the run's id, and the last step that it was told


@contextmanager
def unheard(*signals: signal.Signals) -> Iterator[None]:
    """Processes that are started meanwhile never hear these; this one hears them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WandbRun(Guarded):
    """One wandb run for all the incarnations of ours: the id is kept in the checkpoint.

    Every step is told once: one that is computed again after a resume gives the same numbers, and is left out. Where
    settings have changed, steps after `anew` give others, and are told once more.
    """

    def __init__(
        self,
        project: str,
        name: str,
        run_id: str,
        directory: Path,
        config: dict[str, Any],
        restarts: int = 0,
        anew: int | None = None,
    ) -> None:
        super().__init__("wandb")
        self._run: Any = None
        self._offline: Path | None = None
        self._id, self._mark = run_id, directory / "wandb" / LOGGED
        self.guard(lambda: self._mark.parent.mkdir(parents=True, exist_ok=True))
        # Schedulers signal all processes of a job, and wandb's own would end before the last line has reached it.
        with unheard(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self.guard(lambda: self._start(project, name, run_id, directory, config))
        self.guard(lambda: self._run.summary.update({"restarts": restarts}))
        self._last = self._logged() if anew is None else min(anew, self._logged())

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] <= self._last:
            return
        # The step is an ordinary value here: wandb drops rows whose own step goes back, as it does after a resume.
        numbers = {key: value for key, value in row.items() if key != "sample_ids" and value is not None}
        self.guard(lambda: self._run.log(numbers))
        self._last = row["step"]
        self.guard(lambda: self._mark.write_text(f"{self._id} {self._last}\n"))

    def sample(self, step: int, prompt: str, text: str) -> None:
        def log() -> None:
            import wandb

            page = f"<pre>{html.escape(prompt)}<b>{html.escape(text)}</b></pre>"
            self._run.log({"step": step, "sample": wandb.Html(page)})

        self.guard(log)

    def close(self, exit_code: int) -> None:
        self.guard(lambda: self._run.finish(exit_code=exit_code))
        if self._offline is not None and self.alive:
            print(f"  {'wandb':10} offline: `wandb sync {self._offline}/offline-run-*-{self._id}` sends it", flush=True)
        self.alive = False

    def _logged(self) -> int:
        try:
            run_id, step = read_text(self._mark).split()
            return int(step) if run_id == self._id else 0
        except (OSError, ValueError):
            return 0

    def _start(self, project: str, name: str, run_id: str, directory: Path, config: dict[str, Any]) -> None:
        import wandb

        def begin(mode: str) -> Any:
            return wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(directory),
                config=config,
                mode=mode,  # type: ignore[arg-type]  # a string from the environment
                settings=wandb.Settings(silent=True, init_timeout=30, console="off", x_disable_stats=False),
            )

        mode = chosen_mode()
        if mode == "online" and (why := _why_out_of_reach()):
            logger.warning("wandb is offline, and keeps the figures for `wandb sync`: %s", why)
            mode = "offline"
        try:
            self._run = begin(mode)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning("wandb is offline, and keeps the figures for `wandb sync`: %s", error)
            self._run = begin(mode := "offline")
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            self._offline = directory / "wandb"


MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


def chosen_mode() -> str:
    """`online` where somebody asked for it: by WANDB_MODE, or with a key."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode not in MODES:
        raise Refused(f"WANDB_MODE={mode} is none of {', '.join(MODES)}. Set one of them, or type tracking=none.")
    return mode


def where_it_goes(directory: Path) -> str:
    """A line of the plan that says where figures go: nobody is asked before they leave the machine."""
    mode = chosen_mode()
    if mode == "online":
        return f"wandb, online: figures, texts and the configuration go to {_server()} (WANDB_MODE=offline keeps them)"
    return f"wandb, {mode}, in {directory / 'wandb'}" if mode == "offline" else f"wandb, {mode}"


def _server() -> str:
    """The server, by the environment or by what `wandb login --host` left in wandb's own settings."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    settings = configparser.ConfigParser()
    directory = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    with suppress(configparser.Error, OSError, ValueError):
        settings.read(Path(os.path.expanduser(directory)) / "settings")
    return settings.get("default", "base_url", fallback="https://api.wandb.ai")


def _has_key() -> bool:
    """Whether `wandb login` left a key here, or the environment has one: nothing else asks for going online."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    place, host = os.path.expanduser(os.environ.get("NETRC") or "~/.netrc"), urlsplit(_server()).hostname or ""
    try:
        return netrc.netrc(place).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _why_out_of_reach() -> str:
    """Empty where the server's port opens: wandb itself would try for minutes."""
    address = urlsplit(_server())
    port = address.port or (80 if address.scheme == "http" else 443)
    proxies = getproxies()
    if address.scheme in proxies and not proxy_bypass(address.hostname or ""):
        return ""  # whether it lets us through is seen when it is asked
    try:
        socket.create_connection((address.hostname or "", port), timeout=REACH_S).close()
    except OSError as error:
        return f"{_server()} cannot be reached ({error.strerror or error})"
    return ""
