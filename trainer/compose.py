"""A command line becomes a checked `Config`, by Hydra. Hydra's refusals become one clear paragraph."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from trainer.check import from_hydra, register, text_keys, unknown_key
from trainer.errors import Refused
from trainer.options.config import Config
from trainer.options.launch import is_secret
from trainer.plugins import CONFIG_DIR, directories_in, load

# A path, not a package name: a directory or package called `conf` elsewhere must not be taken for ours.
SEARCH = "hydra.searchpath="
CONF = Path(__file__).resolve().parents[1] / "conf"


def compose(words: Sequence[str]) -> Config:
    """Compose overrides, and check, without running anything. `Refused` if they do not compose."""
    register()
    directories, overrides = _directories(words)
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return from_hydra(hydra.compose("config", overrides=_searched(directories, as_typed(overrides))))
    except (HydraException, OmegaConfBaseException) as error:
        raise Refused(explain(error)) from None


def _directories(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Where else configurations lie, with their plug-ins loaded; and the other words."""
    directories = [directory for _, directory in directories_in(words)]
    load(directories)
    rest, others = iter(words), list[str]()
    for word in rest:
        if word.partition("=")[0] not in CONFIG_DIR:
            others.append(word)
        elif "=" not in word:
            next(rest, None)
    return directories, others


VALUED = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides, and Hydra's flags with their values: its parser knows no overrides on both sides of a flag."""
    rest, overrides, flags = iter(words), list[str](), list[str]()
    for word in rest:
        if not word.startswith("-"):
            overrides.append(word)
        else:
            flags += [word, *([next(rest, "")] if word in VALUED else [])]
    return overrides, flags


def _searched(directories: Sequence[Path], words: Sequence[str]) -> list[str]:
    """The words with one `hydra.searchpath` for these directories and those that were typed: Hydra reads one alone."""
    typed = [word for word in words if word.startswith(SEARCH)]
    paths = [_quoted(f"file://{directory}") for directory in directories]
    paths += [inner for word in typed if (inner := word.removeprefix(SEARCH).strip("[]"))]
    others = [word for word in words if word not in typed]
    return [f"{SEARCH}[{','.join(paths)}]", *others] if paths else others


def compose_from_command_line() -> Config | None:
    """Compose from `sys.argv`, with all of Hydra's flags; None where one of them (`--cfg job`, `--help`) was the job.

    Hydra only composes: training inside its main function would have its errors reworded and its traces cut.
    """
    words = [word.lower().lstrip("+") for word in sys.argv[1:]]
    if {"-m", "--multirun"} & set(words) or any(re.match(r"hydra\.mode=.*multirun", word) for word in words):
        raise Refused("--multirun would train several runs inside one process. Start one command a run.")
    register()
    directories, words = _directories(sys.argv[1:])
    overrides, flags = _apart(words)
    flags += ["--config-dir", str(directories[0])] if directories else []  # of which Hydra's flag takes one
    sys.argv[1:] = [*_searched(directories[1:], as_typed(overrides)), *flags]
    composed: list[DictConfig] = []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised to us rather than printed, with status 1, by Hydra
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(composed.append)()
    except (HydraException, OmegaConfBaseException) as error:
        raise Refused(explain(error)) from None
    sys.argv[1:] = [word for word in sys.argv[1:] if not is_secret(word)]  # which trackers keep
    return from_hydra(composed[0]) if composed else None


def as_typed(words: Sequence[str]) -> list[str]:
    """Quote texts that Hydra would read as something else, or not at all.

    So run.name=1e-5 is a run of that name, and data.path=größe/epoch=3 a path.
    """
    texts, parser = text_keys(), OverridesParser.create()
    pairs = [(word, *word.partition("=")) for word in words]
    return [
        f"{key}={_quoted(value)}" if key in texts and not _is_text(word, parser) else word
        for word, key, _, value in pairs
    ]


def _is_text(word: str, parser: OverridesParser) -> bool:
    try:
        value = parser.parse_override(word).value()
    except HydraException:
        return False
    return value is None or isinstance(value, str)


def _quoted(value: str) -> str:
    """Quote a value with a mark that it does not hold. A value with both stays as it is, for Hydra to refuse."""
    mark = next((mark for mark in "'\"" if mark not in value), "")
    return f"{mark}{value}{mark}" if not value.endswith("\\") else value


def explain(error: Exception) -> str:
    """Explain in one paragraph why Hydra or OmegaConf refused."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        why = text.splitlines()[0]
        quote = "Quote a value that holds = , [ or {, as in 'key=\"a=b\"'."
        return f"The override {error.override} cannot be read: {why}. {quote}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not find '(\w+)/([^']+)'\s+Available options in '\w+':((?:\n\t\w+)+)", text):
        return f"There is no {match[1]}={match[2]}. Choose {match[1]}={'|'.join(match[3].split())}."
    if match := re.search(r"In '(\w+)/([^']+)': .*?Key '([^']+)' not in", text, re.DOTALL):
        return (
            f"The YAML of {match[1]}={match[2]} sets {match[3]}, which is none of its options. Take it out, or "
            f"bring in the options that have it: `- /schema/{match[1]}@_here_: NAME` in its defaults."
        )
    cause = error.__cause__ or error.__context__
    why = str(cause).splitlines()[0] if isinstance(cause, OmegaConfBaseException) else ""
    first = text.splitlines()[0]
    if match := re.fullmatch(r"Error merging override (.+)", first):
        return f"The override {match[1]} does not fit: {why or 'wrong type'}. Type another value."
    return " ".join(line.strip() for line in text.splitlines() if "hydra.cc" not in line) + (f" {why}" if why else "")
