"""Runs, models, archives and names that an enemy made, given to every command that reads such things.

    python -m benchmarks.hostile [--seconds N] [--seed N] [--json]

A corpus first, each with the commands that meet it; then `--seconds` of the same material changed at random: bytes, cut
files, links, pipes, deep and large JSON in any place. Each command runs in a process of its own, with a bound on time,
memory and what it may write. Nothing may run, be changed, deleted or copied out, hang, or end in anything but a status
of ours and a paragraph.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import absolute, finish, options_of
from checkpointing import Piece, save
from checkpointing.__main__ import main as ckpt
from launch.__main__ import main as launch
from tests.harness.models import save_tiny_model
from tests.harness.runs import SMALL
from trainer.cli import main as train
from trainer.compose import compose
from trainer.config import as_json
from trainer.methods.__main__ import main as methods
from trainer.report import main as report

CASE_S, MEMORY_BYTES, WRITTEN_BYTES = 60.0, 3 * 2**30, 256 * 2**20
SECRET = "a line of a private key"
ESCAPE = "\x1b]0;owned\x07"
COMMANDS: dict[str, Callable[..., int]] = {"ckpt": ckpt, "methods": methods, "report": report, "launch": launch}
DEEP = "[" * 200_000
STATUSES = (0, 1, 2)


@dataclass
class Scene:
    """Where one case lives: what it may not touch, and what it is made of."""

    top: Path

    @property
    def run(self) -> Path:
        return self.top / "run"

    @property
    def model(self) -> Path:
        return self.top / "model"

    @property
    def victim(self) -> Path:
        return self.top / "victim"

    @property
    def marker(self) -> Path:
        return self.top / "ran"

    @property
    def generation(self) -> Path:
        return next(path for path in sorted((self.run / "checkpoints").iterdir()) if path.name.startswith("step-"))

    def trap(self) -> bytes:
        return pickle.dumps(Trap(str(self.marker)))

    def code(self, directory: Path) -> None:
        """A module that leaves the marker when it is imported."""
        (directory / "evil.py").write_text(CODE.replace("MARKER", repr(str(self.marker))))


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path(MARKER).touch()

class Config(LlamaConfig):
    model_type = "evil"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokens(PreTrainedTokenizerFast):
    pass
"""

READING = (
    ["ckpt", "ls", "RUN"],
    ["ckpt", "verify", "RUN"],
    ["ckpt", "inspect", "RUN"],
    ["ckpt", "diff", "RUN", "SOUND"],
    ["ckpt", "export", "RUN", "TOP/exported"],
    ["report", "RUN"],
    ["launch", "status", "RUN"],
    ["methods", "merge", "RUN", "TOP/merged"],
)
RESUMING = (["train", "run.dir=RUN", "train.steps=3", *SMALL],)
USING = (["train", "run.dir=TOP/new", "model=hf", "model.path=MODEL", "train.steps=1", *SMALL[5:]],)


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Scene], object]
    commands: Sequence[Sequence[str]] = field(default=READING)


def _link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    """A file of a terabyte, which takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(2**40)


def _said(scene: Scene, config: dict[str, Any], run_id: str = "r") -> None:
    """A checkpoint in which the configuration of its run says something."""
    shutil.rmtree(scene.run / "checkpoints")
    told = as_json(compose([f"run.dir={scene.run}", *SMALL]))
    for key, value in config.items():
        group, _, name = key.partition(".")
        told = {**told, group: {**told[group], name: value}} if name else {**told, group: value}
    state = {"config": told, "fingerprint": "", "architecture": "", "step": 1}
    pieces = [Piece("model/w", torch.zeros(4), (0,), (4,))]
    save(scene.run / "checkpoints", 1, pieces, {"trainer": state, "note": ESCAPE}, run_id=run_id)


def _remote_code(scene: Scene) -> None:
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokens", None]}
    for file in ("config.json", "tokenizer_config.json"):
        path = scene.model / file
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "auto_map": names, "model_type": "evil", "tokenizer_class": "Tokens"}))
    scene.code(scene.model)


def _pickled_weights(scene: Scene) -> None:
    (scene.model / "model.safetensors").unlink()
    torch.save({"w": torch.ones(2), "trap": Trap(str(scene.marker))}, scene.model / "pytorch_model.bin")


def _template(scene: Scene, text: str) -> None:
    (scene.model / "chat_template.jinja").write_text(text)


def _header(scene: Scene, data: bytes) -> None:
    (scene.model / "model.safetensors").write_bytes(data)


def _index_outside(scene: Scene) -> None:
    (scene.model / "model.safetensors").unlink()
    where = {"model.embed_tokens.weight": "../victim/key"}
    (scene.model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _file(scene: Scene, data: Any) -> None:
    """What FILE is: bytes as they are, anything else as torch writes it."""
    path = scene.top / "file"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        torch.save(data, path)


def _bomb(scene: Scene) -> None:
    held = io.BytesIO()
    torch.save({"w": torch.zeros(2**20)}, held)
    with zipfile.ZipFile(held) as old, zipfile.ZipFile(scene.top / "file", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) * (64 if "/data/" in name else 1))


def _climbing(scene: Scene) -> None:
    with zipfile.ZipFile(scene.top / "file", "w") as archive:
        archive.writestr("../victim/key", "overwritten")
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/version", "3")


def _deepspeed(scene: Scene, latest: str) -> None:
    directory = scene.top / "file"
    (directory / "global_step1").mkdir(parents=True)
    (directory / "latest").write_text(latest)
    torch.save({"module": {"w": torch.ones(2)}}, directory / "global_step1" / "mp_rank_00_model_states.pt")


def _dcp(scene: Scene) -> None:
    directory = scene.top / "file"
    directory.mkdir()
    (directory / ".metadata").write_bytes(scene.trap())
    (directory / "__0_0.distcp").write_bytes(b"\0" * 64)


def _manifest(scene: Scene, old: str, new: str) -> None:
    path = scene.generation / "manifest.json"
    path.write_text(path.read_text().replace(old, new))


def each(
    what: str, act: Callable[[Scene, str], object], names: Sequence[str], commands: Sequence[Sequence[str]]
) -> list[Case]:
    return [Case(what.format(ascii(name)), partial(_with, act, name), commands) for name in names]


def _with(act: Callable[[Scene, str], object], name: str, scene: Scene) -> None:
    act(scene, name)


def corpus() -> list[Case]:
    """Every kind of thing that somebody else may have written."""
    return [*runs(), *generations(), *models(), *archives(), *names()]


def _believed(scene: Scene) -> None:
    """A checkpoint that says that the code of its model may run."""
    _remote_code(scene)
    model = as_json(compose(["model=hf", f"model.path={scene.model}"]))["model"]
    _said(scene, {"model": {**model, "trust_remote_code": True}})


def runs() -> list[Case]:
    both = (*READING, *RESUMING)
    records = ["metrics.jsonl", "events.jsonl", "samples.jsonl", "checkpoints/metrics.late.jsonl"]
    control = ["memory-id", ".identity.json", "config.yaml", "checkpoints/.lease/lease-000009.json"]
    holds = ["checkpoints/hold-x.json", "checkpoints/hold-x.read-y.json"]
    described = ["hf/config.json", "hf/tokenizer.json"]
    places = ["checkpoints", "hf", "wandb", "profile", ".lease", "checkpoints/.lease", "launch"]
    places += ["checkpoints/step-00000009-0123456789abcdef"]
    texts = {"run.name": "${oc.env:HOME}", "data.path": "${oc.env:PATH}"}
    memories = ["", ".", "../victim", "VICTIM", "a/../../victim", "x-0123456789ab\n../victim", "\0"]
    return [
        Case("a checkpoint that says its model's code may run", _believed),
        Case("interpolations in a checkpoint", lambda s: _said(s, texts), both),
        Case("a function's name in a checkpoint", lambda s: _said(s, {"model": {"_target_": "os.mkdir"}}), both),
        Case("escapes in a checkpoint", lambda s: _said(s, {"run.name": ESCAPE}, run_id=ESCAPE), both),
        Case("a deep configuration in a checkpoint", lambda s: _said(s, {"run.name": [[[[[]]]]] * 1000}), both),
        *each("memory of {}", _memory_of, memories, RESUMING),
        *each("a pipe for {}", lambda s, n: _pipe(s.run / n), [*records, *control, *holds, *described], both),
        *each("a terabyte for {}", lambda s, n: _sparse(s.run / n), [*records, *control, *holds, *described[:1]], both),
        *each("a link for {}", lambda s, n: _link(s.run / n, s.victim / "key"), [*records, *control], both),
        *each("a link for {}", lambda s, n: _link(s.run / n, s.victim / "key"), [*described, "report.html"], both),
        *each("a link for the directory {}", lambda s, n: _link(s.run / n, s.victim), places, both),
        *each("deep JSON in {}", lambda s, n: (s.run / n).write_text(DEEP), [*records[:2], *control[:2]], both),
        *each("deep JSON in {}", lambda s, n: (s.run / n).write_text(DEEP), [*holds, *described], both),
        Case("a claim of the first process", lambda s: _claim(s, "lease-999999.json"), both),
        Case("a claim whose number has no end", lambda s: _claim(s, f"lease-{'9' * 200}.json"), both),
    ]


def _memory_of(scene: Scene, name: str) -> None:
    (scene.run / "memory-id").write_text(name.replace("VICTIM", str(scene.victim)))


def _claim(scene: Scene, name: str) -> None:
    (scene.run / "checkpoints" / ".lease" / name).write_text(json.dumps({"pid": 1}))


def generations() -> list[Case]:
    both = (*READING, *RESUMING)
    files = ["manifest.json", "COMMIT", "index-*", "shard-*"]

    def rename(scene: Scene) -> None:
        scene.generation.rename(scene.generation.with_name("step-99999999-" + "f" * 16))

    return [
        Case("a manifest that is deep", lambda s: (s.generation / "manifest.json").write_text(DEEP), both),
        Case("a manifest of a terabyte", lambda s: _sparse(s.generation / "manifest.json"), both),
        *each("a pipe for a generation's {}", lambda s, n: _pipe(next(s.generation.glob(n))), files, both),
        *each("a link for a generation's {}", _link_in_generation, files, both),
        Case("a writer whose files are elsewhere", lambda s: _manifest(s, "shard-00000", "../../victim/key"), both),
        Case("a generation under another's name", rename, both),
    ]


def _link_in_generation(scene: Scene, name: str) -> None:
    _link(next(scene.generation.glob(name)), scene.victim / "key")


def _impossible(scene: Scene) -> None:
    path = scene.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 2**40}))


def models() -> list[Case]:
    classes, endless = "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(10**12) %}x{% endfor %}"
    return [
        Case("a model with code", _remote_code, USING),
        Case("weights that are a pickle", _pickled_weights, USING),
        *each("a template that says {}", _template, [classes, endless], USING),
        Case("a header that is longer than the file", lambda s: _header(s, b"\xff" * 8 + b"{}"), USING),
        Case("a header that is deep", lambda s: _header(s, (200_000).to_bytes(8, "little") + DEEP.encode()), USING),
        Case("an index of a file elsewhere", _index_outside, USING),
        Case("a pipe for the weights", lambda s: _pipe(s.model / "model.safetensors"), USING),
        Case("a model's configuration that is deep", lambda s: (s.model / "config.json").write_text(DEEP), USING),
        Case("a model of impossible sizes", _impossible, USING),
    ]


def archives() -> list[Case]:
    trusted = (["ckpt", "import", "FILE", "TOP/imported", "--trust-pickle"],)
    plain = (["ckpt", "import", "FILE", "TOP/imported"],)

    def trap(scene: Scene) -> None:
        _file(scene, {"w": torch.ones(2), "trap": Trap(str(scene.marker))})

    return [
        Case("a pickle that runs, believed", trap, trusted),
        Case("a pickle that runs, not believed", trap, plain),
        Case("a bare pickle that runs", lambda s: _file(s, s.trap()), trusted),
        Case("an archive that unfolds", _bomb, trusted),
        Case("an archive that climbs", _climbing, trusted),
        Case("one number that is a million", lambda s: _file(s, {"w": torch.ones(1).expand(10**6)}), trusted),
        *each("a checkpoint of DeepSpeed whose latest is {}", _deepspeed, ["../victim", "/", "a\nb", ""], trusted),
        Case("a description of DCP that runs", _dcp, trusted),
        Case(
            "a difference that is none",
            lambda s: _file(s, b"\xff" * 8 + b"{}"),
            (["methods", "apply", "MODEL", "FILE", "TOP/applied"],),
        ),
    ]


def names() -> list[Case]:
    """Names of runs, which a job's script holds."""
    return [
        Case(
            f"a run of the name {name!r}",
            lambda scene: None,
            (["launch", "slurm", "--dry-run", "--", f"run.name={name}", f"run.dir=TOP/{name}"],),
        )
        for name in ("a\\n#SBATCH --wrap=x", "%j", "$(touch ran)", "-o", "..")
    ]


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


def changed_at_random(rng: random.Random) -> Case:
    """One or two files of a run, a model or an archive, changed; and one command that reads them."""
    seed = rng.randrange(2**32)
    words = rng.choice(
        [*READING, *READING, *RESUMING, *USING, ["ckpt", "import", "FILE", "TOP/imported", "--trust-pickle"]]
    )

    def prepare(scene: Scene) -> None:
        draw = random.Random(seed)
        if words[:2] == ["ckpt", "import"]:
            _file(scene, {"w": torch.arange(50.0), "n": [1, {"a": (2, None)}], "h": torch.ones(3, 4).bfloat16()})
        home = scene.top / "file" if words[1:2] == ["import"] else scene.model if "model=hf" in words else scene.run
        files = [home] if home.is_file() else sorted(path for path in home.rglob("*") if path.is_file())
        for _ in range(draw.choice((1, 1, 2))):
            _change(draw.choice(files), scene, draw)

    return Case(f"changed by {seed}", prepare, [words])


WAYS = (
    "bytes",
    "bytes",
    "bytes",
    "cut",
    "empty",
    "link",
    "directory link",
    "pipe",
    "directory",
    "deep",
    "large",
    "word",
)


def _change(path: Path, scene: Scene, rng: random.Random) -> None:
    if not path.is_file() or path.is_symlink():
        return  # changed already
    how = rng.choice(WAYS)
    data = path.read_bytes() if path.is_file() and path.stat().st_size < 2**24 else b""
    if how == "bytes" and data:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4, 32))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(bytes(changed))
    elif how == "cut":
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif how == "word" and data:
        at = rng.randrange(len(data))
        word = rng.choice(
            [b"null", b"-1", b"1e999", b"9" * 40, b"../../victim/key", b"${oc.env:HOME}", ESCAPE.encode()]
        )
        path.write_bytes(data[:at] + word + data[at + rng.randrange(8) :])
    elif how in ("link", "directory link"):
        _link(path, scene.victim / "key" if how == "link" else scene.victim)
    elif how == "pipe":
        _pipe(path)
    elif how == "directory":
        path.unlink(missing_ok=True)
        path.mkdir(exist_ok=True)
    elif how == "deep":
        path.write_text(DEEP)
    elif how == "large":
        _sparse(path)
    else:
        path.write_bytes(b"")


def _said_wrong(material: Material, case: Case) -> bool:
    """Whether a case went wrong, which is printed."""
    found = material.run(case)
    for one in found:
        print(f"{case.name}: {one}", file=sys.stderr, flush=True)
    return bool(found)


QUICK = {"seconds": 0.0, "cases": 12}


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
