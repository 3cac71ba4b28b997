"""Runs, models, archives and names that an enemy made, given to every command that reads such things.

    python -m benchmarks.hostile [--seconds N] [--seed N] [--json]

A corpus first (`hostile_corpus.py`), each case with the commands that meet it; then `--seconds` of the same material
changed at random. Each command runs in a process of its own, with a bound on time, memory and what it may write.
Nothing may run, be changed, deleted or copied out, hang, or end in anything but a status of ours and a paragraph.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.hostile_corpus import SECRET, Case, Scene, changed_at_random, corpus
from benchmarks.report import absolute, finish, options_of
from checkpointing.__main__ import main as ckpt
from launch.__main__ import main as launch
from tests.harness.models import save_tiny_model
from tests.harness.runs import SMALL
from trainer.cli import main as train
from trainer.methods.__main__ import main as methods
from trainer.report import main as report

CASE_S, MEMORY_BYTES, WRITTEN_BYTES = 60.0, 3 * 2**30, 256 * 2**20
COMMANDS: dict[str, Callable[..., int]] = {"ckpt": ckpt, "methods": methods, "report": report, "launch": launch}
STATUSES = (0, 1, 2)


def judged(scene: Scene, words: Sequence[str], sound: Path) -> list[str]:
    """Run a command in a fork; what is wrong with what it did."""
    before = _listing(scene.victim)
    names = {"RUN": scene.run, "MODEL": scene.model, "FILE": scene.top / "file", "SOUND": sound, "TOP": scene.top}
    words = [_filled(word, names) for word in words]
    said = scene.top / "said"
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be(words, said, scene.top)
    status, wrong = None, []
    while time.monotonic() < began + CASE_S:
        done, told = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(told)
            break
        time.sleep(0.005)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        wrong.append("hangs")
    text = said.read_text(errors="replace") if said.exists() else ""
    if status is not None and status not in STATUSES:
        wrong.append(f"ends with {status}: {text[-300:]}")
    if "Traceback" in text:
        wrong.append(f"a traceback: {text[-400:]}")
    if "\x1b" in text or "\x07" in text:
        wrong.append("prints an escape")
    if scene.marker.exists():
        wrong.append("runs")
    if _listing(scene.victim) != before:
        wrong.append("changes or deletes what is elsewhere")
    if SECRET in text or _has_secret(scene):
        wrong.append("copies out what is elsewhere")
    return wrong


def _filled(word: str, names: dict[str, Path]) -> str:
    for name, path in names.items():
        word = word.replace(name, str(path)) if name in word.split("=")[-1].split("/")[0] else word
    return word


def _be(words: Sequence[str], said: Path, top: Path) -> None:
    """Become one command, in the fork: bounded, with all that it says in a file."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, errors="backslashreplace") for fd in (1, 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN_BYTES, WRITTEN_BYTES))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    torch.set_num_threads(1)  # a pool of threads does not live on in a fork, and would be waited for
    os.chdir(top)
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", HF_MODULES_CACHE=str(top / "modules"))
    status = 1
    try:
        if words[0] == "train":
            sys.argv = ["trainer", *words[1:]]
            status = train()
        else:
            status = COMMANDS[words[0]](list(words[1:]))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _listing(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def _has_secret(scene: Scene) -> bool:
    """Whether anything that was written holds what is in the victim's file."""
    for top in (scene.top / "exported", scene.top / "merged", scene.top / "imported", scene.top / "new"):
        for path in top.rglob("*"):
            if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
                return True
    return False


class Material:
    """What cases are made of: a run that was trained, and a model, copied for each."""

    def __init__(self, top: Path) -> None:
        self.top = top
        save_tiny_model(top / "model")
        words = ["train", f"run.dir={top / 'run'}", "train.steps=2", "checkpoint.every=1", *SMALL]
        if wrong := judged(Scene(top), words, top):
            raise RuntimeError(f"the run that cases are made of: {wrong}\n{(top / 'said').read_text()[-2000:]}")
        shutil.copytree(top / "run", top / "sound")

    @contextlib.contextmanager
    def scene(self) -> Iterator[Scene]:
        top = Path(tempfile.mkdtemp(prefix="case-", dir=self.top))
        shutil.copytree(self.top / "run", top / "run", symlinks=True)
        shutil.copytree(self.top / "model", top / "model")
        (top / "victim").mkdir()
        (top / "victim" / "key").write_text(f"{SECRET}\n")
        (top / "victim" / "step-00000001-0123456789abcdef").mkdir()
        (top / "victim" / "step-00000001-0123456789abcdef" / "COMMIT").write_text("x")
        try:
            yield Scene(top)
        finally:
            shutil.rmtree(top, ignore_errors=True)

    def run(self, case: Case) -> list[str]:
        found = []
        for words in case.commands:
            with self.scene() as scene:
                case.prepare(scene)
                found += [f"{' '.join(words[:2])}: {one}" for one in judged(scene, words, self.top / "sound")]
        return found


def _said_wrong(material: Material, case: Case) -> bool:
    """Whether a case went wrong, which is printed."""
    found = material.run(case)
    for one in found:
        print(f"{case.name}: {one}", file=sys.stderr, flush=True)
    return bool(found)


QUICK = {"seconds": 0.0, "cases": 5}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="of changes at random (default 240)")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="only N of the corpus, drawn")
    parser.add_argument("--only", default="", metavar="TEXT", help="of the corpus, what has this in its name")
    parser.add_argument("--seed", type=int, default=0)
    options = options_of(parser, QUICK)
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    cases = [case for case in corpus() if options.only in case.name]
    if options.cases:
        cases = rng.sample(cases, min(options.cases, len(cases)))
    with tempfile.TemporaryDirectory() as top:
        logging.disable()
        material = Material(Path(top))
        logging.disable(logging.NOTSET)
        wrong = sum(_said_wrong(material, case) for case in cases)
        deadline, tried = time.monotonic() + options.seconds, 0
        while time.monotonic() < deadline:
            wrong += _said_wrong(material, changed_at_random(rng))
            tried += 1
    full = not options.cases and not options.only
    table = [
        absolute("things that an enemy made", "", len(cases), better="higher", bar=30, full=full),
        absolute("things changed at random", "", tried, better="higher", bar=100, full=full),
        absolute("that ran, deleted, left, hung or were not understood", "", wrong, better="lower", bar=0),
    ]
    return finish("hostile", table, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
