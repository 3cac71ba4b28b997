"""Sweeps: a run for every point that the overrides span, one after another here, or as an array of SLURM jobs.

Each point trains in processes of its own, below the directory of the sweep.
"""

from __future__ import annotations

import importlib
import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from checkpointing.errors import reason_of
from checkpointing.small_files import read_json
from launch.command import Command, python
from launch.options import Call, composable, is_override, quote
from launch.status import POINTS, summary
from trainer.compose import compose
from trainer.elastic.preemption import AGAIN, not_ignored, warnings_of
from trainer.errors import Refused


def run_points(call: Call) -> int:
    """Start them all; the first status that is not 0."""
    target = importlib.import_module(f"launch.{call.target}")
    calls = points(call)
    for one in calls:
        target.check(one)
    home = Path(call.config.run.dir)
    if call.target == "slurm":
        return _as_jobs(calls, call)
    commands = [_command(one) for one in calls]
    if call.dry_run:
        print("\n".join(map(str, commands)))
        return 0
    _refuse_other_points(home, calls)
    _write_down(home, calls)
    status = 0
    for one, command in zip(calls, commands, strict=True):
        print(f"launch: {one.config.run.name}: {shlex.join(_own(one))}", flush=True)
        ended = _run(command, call.config.elastic.signal)
        status = ended or status
        if ended in (AGAIN, 130) or ended > 128:  # somebody wants the machine: the others do not start
            return ended
    print(summary(home))
    return status


def _run(command: Command, warning: str) -> int:
    """Run a command in a session of its own: a terminal's signals reach it once, by way of this process."""
    with subprocess.Popen(command.words, start_new_session=True) as process:
        numbers = not_ignored([*warnings_of(warning), signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
        before = {n: signal.signal(n, lambda number, _: process.send_signal(number)) for n in numbers}
        try:
            ended = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return ended if ended >= 0 else 128 - ended


def points(call: Call) -> list[Call]:
    """One call a point, with a name and a directory of its own. `Refused` where nothing is spanned."""
    fixed = [w for w in call.overrides if not is_override(w) or not w.startswith(("run.name=", "run.dir="))]
    parser, spans, rest = OverridesParser.create(), list[list[str]](), list[str]()
    for word in fixed:
        try:
            override = parser.parse_override(word) if is_override(word) else None
        except HydraException as error:
            raise Refused(f"{word} cannot be read: {reason_of(error)}. Quote it, or mend it.") from None
        if override is None or not override.is_sweep_override():
            rest.append(word)
            continue
        try:
            values = list(override.sweep_string_iterator())
        except HydraException as error:
            raise Refused(f"{word} is no list of values: {error}. Type {word.partition('=')[0]}=A,B.") from None
        spans.append([f"{override.get_key_element()}={value}" for value in values])
    if not spans:
        raise Refused("--multirun, and no override has several values. Type one such as optimizer.lr=1e-3,1e-4.")
    name, home, found = call.config.run.name, Path(call.config.run.dir), list[Call]()
    for number, point in enumerate(itertools.product(*spans)):
        words = [*rest, *point, f"run.name={quote(f'{name}-{number}')}", f"run.dir={quote(str(home / str(number)))}"]
        config = replace(compose(composable(words)), launch=call.config.launch)
        found.append(replace(call, config=config, overrides=words, multirun=False))
    return found


def _own(call: Call) -> list[str]:
    return [word for word in call.overrides if not word.startswith(("run.name=", "run.dir="))]


def _command(call: Call) -> Command:
    return Command(python("-m", "launch", call.target, *call.flags, "--", *call.overrides))


def _refuse_other_points(home: Path, calls: Sequence[Call]) -> None:
    """`Refused` where a point of the sweep that is there would be another one: its numbers would stand for both.

    A point is the values that a sweep spans; whether other options may change is for each run to say.
    """
    try:
        there = {str(one["dir"]): [str(word) for word in one["overrides"]] for one in read_json(home / POINTS)}
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or none of ours
    now = {Path(call.config.run.dir).name: _own(call) for call in calls}
    spanned = _spanned(there.values()) | _spanned(now.values())
    for name in there.keys() & now.keys():
        was, is_ = (_values(words, spanned) for words in (there[name], now[name]))
        if was != is_ and (home / name / "metrics.jsonl").exists():
            raise Refused(
                f"{home} holds a sweep over other points: point {name} was {' '.join(was)}, and is {' '.join(is_)} "
                "now. Choose another run.name."
            )


def _spanned(points: Iterable[Sequence[str]]) -> set[str]:
    """The keys that have several values among points."""
    values: dict[str, set[str]] = {}
    for words in points:
        for word in words:
            key, _, value = word.partition("=")
            values.setdefault(key, set()).add(value)
    return {key for key, several in values.items() if len(several) > 1}


def _values(words: Sequence[str], keys: Collection[str]) -> list[str]:
    return sorted(word for word in words if word.partition("=")[0] in keys)


def _write_down(home: Path, calls: Sequence[Call]) -> None:
    told = [{"dir": Path(call.config.run.dir).name, "overrides": _own(call)} for call in calls]
    home.mkdir(parents=True, exist_ok=True)
    (home / POINTS).write_text(json.dumps(told, indent=1), encoding="utf-8")


def _as_jobs(calls: Sequence[Call], call: Call) -> int:
    from launch.scheduler import submit
    from launch.slurm import ALLOWED, hand_in, script

    made = script(calls, call.config.run.name)
    if call.dry_run:
        print(made)
        return 0
    home = Path(call.config.run.dir).absolute()
    _refuse_other_points(home, calls)
    job = hand_in(made)
    _write_down(home, calls)
    print(f"submitted job {job}, {len(calls)} points")
    command = Command(python("-m", "launch", "status", str(home)))
    where = ["--job-name=summary", f"--dependency=afterany:{job}", f"--output={home / 'summary.txt'}", "--ntasks=1"]
    where += [f"--{key}={value}" for key in ALLOWED if (value := getattr(call.config.launch, key))]
    try:
        last = submit(f"--wrap={command}", where)
    except Refused as error:  # the points are on their way
        print(f"launch: no job for the summary: {error} Type `{command}` when all have ended.", file=sys.stderr)
    else:
        print(f"submitted job {last}, which writes {home / 'summary.txt'} when all have ended")
    return 0
