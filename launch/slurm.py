"""SLURM: the script of a job, from `job.sbatch`, and handing it in. What the job needs of this place goes with it."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpointing import FileStorage, file_of, is_path, open_storage
from launch.command import ROOT
from launch.health import OPTIONS
from launch.options import Call, bounds, check_sizes
from launch.provenance import leave_behind
from launch.scheduler import OVER, ask, state_of, submit
from trainer.errors import Refused
from trainer.inside import refuse_links
from trainer.options.elastic import Elastic
from trainer.options.launch import SlurmLaunch

TEMPLATE = Path(__file__).with_name("job.sbatch")
ALLOWED = ("partition", "account", "qos")  # without which some clusters take no job
MARGIN_S = 20  # of the warning's time, for what comes before and after the save


@dataclass(frozen=True)
class Script:
    """A script for `sbatch`."""

    text: str
    runs: Sequence[Call]

    def __str__(self) -> str:
        return self.text


def check(call: Call) -> None:
    options = call.config.launch
    assert isinstance(options, SlurmLaunch)
    least, most = bounds(options.nodes, "launch.nodes")
    check_sizes(call.config, [nodes * options.nproc for nodes in range(least, most + 1)])
    if options.gpus and options.nproc > options.gpus:
        raise Refused(
            f"--nproc {options.nproc} and --gpus {options.gpus}: a machine has fewer GPUs than processes. Type --nproc "
            f"{options.gpus}, or --gpus {options.nproc}."
        )
    if _warning(call) == "TERM":
        raise Refused(
            "elastic.signal=TERM cannot warn a job of SLURM, which ends jobs by it. Type elastic.signal=USR1 or USR2."
        )


def _warning(call: Call) -> str:
    return call.config.elastic.signal.upper().removeprefix("SIG")


def plan(call: Call) -> Script:
    return script([call], call.config.run.name)


def script(calls: Sequence[Call], name: str) -> Script:
    """The job script of one run, or of several as an array."""
    options, memory = calls[0].config.launch, calls[0].config.checkpoint.memory
    assert isinstance(options, SlurmLaunch)
    if options.gpus > options.nproc:
        print(
            f"launch: --gpus {options.gpus} and --nproc {options.nproc}: {options.gpus - options.nproc} GPUs of each "
            f"machine stay idle. --nproc {options.gpus} uses all.",
            file=sys.stderr,
        )
    runs = [patient(call) for call in calls]
    keeper = '"${each[@]}" "$python" -m launch.keeper "${overrides[@]}" &' if memory.every else ""
    values = {
        "options": "\n".join(f"#SBATCH {_checked(flag)}" for flag in flags(options, name, runs)),
        "directory": shlex.quote(str(Path.cwd())),
        "setup": "\n".join(options.setup),
        "home": shlex.quote(str(_home(runs) / "launch")),
        "warning": _warning(calls[0]),
        "python": shlex.quote(sys.executable),
        "root": shlex.quote(str(ROOT)),
        "runs": which_run(runs),
        "group": shlex.quote(name),
        "srun": "".join(f" {shlex.quote(flag)}" for flag in options.srun),
        "warn_s": str(options.warn_s),
        "keeper": keeper,
        "nproc": str(options.nproc),
    }
    for key in ("directory", "home", "python", "root"):  # some stand in a comment
        _checked(values[key])
    return Script(fill(TEMPLATE.read_text(encoding="utf-8"), values), runs)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Each `{{name}}` by its value, and nothing inside a value; a line that is an empty value is left out."""

    def value(match: re.Match[str]) -> str:
        found = values[match["line"] or match["word"]]
        return found + "\n" if match["line"] and found else found

    return re.sub(r"^\{\{(?P<line>\w+)\}\}\n|\{\{(?P<word>\w+)\}\}", value, template, flags=re.MULTILINE)


def _checked(line: str) -> str:
    if not line.isprintable():
        raise Refused(
            f"{line!r} would be more than one line of the job's script: it holds a line break or a control character. "
            "Type it without."
        )
    return line


def patient(call: Call) -> Call:
    """A call with as much time to save as SLURM gives, unless the configuration says how much."""
    options = call.config.launch
    assert isinstance(options, SlurmLaunch)
    given = any(word.startswith("elastic.grace_s=") for word in call.overrides)
    if given or call.config.elastic.grace_s != Elastic().grace_s:
        return call
    grace_s = max(options.warn_s - MARGIN_S, options.warn_s // 2)
    return replace(call, overrides=[*call.overrides, f"elastic.grace_s={grace_s}"])


def flags(options: SlurmLaunch, name: str, runs: Sequence[Call]) -> list[str]:
    """The options of sbatch, one a line."""
    least, most = bounds(options.nodes, "launch.nodes")
    nodes = f"{least}" if least == most else f"{least}-{most}"
    home = Path(str(_home(runs)).replace("%", "%%"))  # a sign of sbatch's, for numbers of the job
    where = home / "launch" / ("job-%A_%a.log" if len(runs) > 1 else "job-%j.log")
    found = [f"--job-name={_word(name)}", f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={_quoted(where)}"]
    found += ["--requeue", "--open-mode=append", f"--signal=B:{_warning(runs[0])}@{options.warn_s}"]
    if len(runs) > 1:
        at_once = f"%{options.parallel_points}" if options.parallel_points else ""
        found.append(f"--array=0-{len(runs) - 1}{at_once}")
    given = {
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "gres": f"gpu:{options.gpus}" if options.gpus else "",
        "cpus-per-task": str(options.cpus) if options.cpus else "",
        "mem": options.mem,
        "exclude": options.exclude,
        "dependency": options.dependency,
    }
    return [*found, *(f"--{flag}={value}" for flag, value in given.items() if value), *options.sbatch]


def _home(runs: Sequence[Call]) -> Path:
    first = Path(runs[0].config.run.dir).absolute()
    return first.parent if len(runs) > 1 else first


def _quoted(path: Path) -> str:
    """Quote a path for sbatch's options. `Refused` for a name that sbatch would read as more than one."""
    if found := re.search(r'["\\]', str(path)):
        raise Refused(f"sbatch takes {found[0]} in {path} for a sign of its own. Type run.dir=DIRECTORY without it.")
    return str(path) if re.fullmatch(r"[\w./%@+:,=-]+", str(path)) else f'"{path}"'


def _word(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)


def which_run(runs: Sequence[Call]) -> str:
    """Bash that sets `run`, `overrides`, and what the job's commands need to know; of an array those of the task."""

    def one(call: Call) -> str:
        run = shlex.quote(str(Path(call.config.run.dir).absolute()))
        told = shlex.quote(json.dumps(_told(call)))
        return f"run={run}; overrides=({shlex.join(call.overrides)}); export {OPTIONS}={told}"

    if len(runs) == 1:
        return one(runs[0])
    cases = "\n".join(f"  {number}) {one(call)} ;;" for number, call in enumerate(runs))
    return f"case $SLURM_ARRAY_TASK_ID in\n{cases}\nesac"


def _told(call: Call) -> dict[str, Any]:
    options = call.config.launch
    assert isinstance(options, SlurmLaunch)
    return {
        **_checkpoints(call.config.checkpoint.dir),
        "max_requeues": options.max_requeues,
        "exclude": options.exclude,
        "health": options.health,
        "gpus": options.gpus,
    }


def _checkpoints(place: str) -> dict[str, str]:
    """Where the run's generations lie, as the job finds them from any directory."""
    storage, file = open_storage(place), file_of(place)
    place = str(storage.root.absolute()) if isinstance(storage, FileStorage) and file is None else place
    return {"checkpoints": place, **({} if file is None else {"store": str(file)})}


def run(call: Call, script: Script) -> int:
    job = hand_in(script)
    where = call.config.run.dir
    print(f"submitted job {job}: `python -m launch follow {where}` prints what it prints, `cancel` ends it")
    return 0


def _refuse_second(directory: Path) -> None:
    """Two jobs of one run would take each other's attempts for their own."""
    job = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (directory / "job").is_file():
            with open(directory / "job", encoding="utf-8") as file:
                job = file.read(100).strip()
    if job and (state := state_of(job)[0]) not in OVER:
        raise Refused(
            f"{directory.parent} has a job already: {job} is {state}. `python -m launch cancel {directory.parent}` "
            "ends it, and `follow` prints what it prints."
        )


def hand_in(script: Script) -> str:
    """Write down what the job needs, and submit it; its number."""
    ask("sbatch", "--version")
    home = _home(script.runs) / "launch"
    for call in script.runs:
        run, place = call.config.run.dir, call.config.checkpoint.dir
        refuse_links(Path(run), Path(place if is_path(place) else run))
    for directory in dict.fromkeys([home, *(Path(call.config.run.dir).absolute() / "launch" for call in script.runs)]):
        _refuse_second(directory)
    path = home / "job.sbatch"
    try:
        home.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)  # its set-up lines may hold secrets
        path.write_text(script.text, encoding="utf-8")
    except OSError as error:
        raise Refused(
            f"{home} cannot be written: {error.strerror or error}. Make it writable, or type run.dir=DIRECTORY with "
            "one that can."
        ) from None
    ask("sbatch", "--test-only", str(path))  # which sees what a submission would let wait for ever
    for call in script.runs:
        leave_behind(call)
    job = submit(str(path))
    (home / "job").write_text(f"{job}\n", encoding="utf-8")
    for number, call in enumerate(script.runs):
        own = f"{job}_{number}" if len(script.runs) > 1 else job
        (Path(call.config.run.dir) / "launch" / "job").write_text(f"{own}\n", encoding="utf-8")
    return job
