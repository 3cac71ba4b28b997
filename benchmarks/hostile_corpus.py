"""What an enemy may have written: runs, generations, models, archives and names, and the commands that meet each.

`corpus()` is the kinds that somebody thought of; `changed_at_random()` is the same material with files changed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpointing import Piece, save
from tests.harness.runs import SMALL
from trainer.compose import compose
from trainer.options.stored import as_json

SECRET = "a line of a private key"
ESCAPE = "\x1b]0;owned\x07"
DEEP = "[" * 200_000


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
OTHERS = [word for word in SMALL if not word.startswith("model.")]  # for a model that comes with its sizes
USING = (["train", "run.dir=TOP/new", "model=hf", "model.path=MODEL", "train.steps=1", *OTHERS],)


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


def _pipe_for_index(scene: Scene) -> None:
    (scene.model / "model.safetensors").unlink()
    _pipe(scene.model / "model.safetensors.index.json")


def _linked_pipe(scene: Scene) -> None:
    _pipe(scene.top / "elsewhere")
    (scene.model / "tokenizer.json").unlink()
    (scene.model / "tokenizer.json").symlink_to(scene.top / "elsewhere")


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
        Case("a pipe for the index of weights", _pipe_for_index, USING),
        Case("a pipe for a model's configuration", lambda s: _pipe(s.model / "config.json"), USING),
        Case("a link to a pipe for a tokenizer", _linked_pipe, USING),
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
