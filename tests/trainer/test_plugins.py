"""A method, an optimizer, a store and a reducer of new kinds, each by one file and one YAML of somebody's own.

Nothing in the project knows them, and the shared suites run on them as on any other.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointing import stores
from tests.harness.engines import LAYOUTS, STEPS, contents_differ, furthest, resume, start, train_and_save
from tests.harness.runs import SMALL, launch, rows, trainer
from tests.harness.worlds import SharedWorld
from tests.trainer.methods import test_conformance as conformance
from trainer.compose import compose, compose_from_command_line
from trainer.errors import Refused
from trainer.options.config import CHOICES, is_free
from trainer.options.parallel import REDUCERS
from trainer.options.stored import as_json, from_json

GAINS = '''
"""Train a gain beside every norm: `y = norm(x) * gain`, one at first. The base is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from checkpointing import parameter_names
from trainer.methods.deltas import difference
from trainer.methods.method import Method
from trainer.options import method as options
from trainer.options.field import option


@dataclass
class GainOptions(options.MethodOptions):
    """Train gains."""

    made_by: ClassVar[str] = f"{__name__}:Gains"
    from_layer: int = option(0, low=0)  # the first layer that has them


OPTIONS = GainOptions


class Gained(nn.Module):
    def forward(self, hidden):
        return super().forward(hidden) * self.gain


class Gains(Method):
    def attach(self, model, sizes=None):
        model.requires_grad_(False)
        for module in list(model.modules()):
            if type(module).__name__.endswith("RMSNorm"):
                module.__class__ = type("Gained", (Gained, type(module)), {})
                module.gain = nn.Parameter(torch.ones_like(module.weight))
        return model

    def adds(self, name):
        return name.endswith(".gain")

    def merged(self, run):
        model = run.base()
        with torch.no_grad():
            for name, parameter in parameter_names(model).items():
                gain = f"model/{name.removesuffix('.weight')}.gain"
                if gain in run.names:
                    parameter.mul_(run.tensor(gain))
        return model

    def delta(self, run, base):
        base = run.base() if base is None else base
        return difference(parameter_names(base), parameter_names(self.merged(run)), "gains")
'''

LION = '''
"""Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an average of gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from trainer.options.optimizer import Optimizer


@dataclass
class LionOptions(Optimizer):
    """Lion."""

    made_by: ClassVar[str] = f"{__name__}:LionKind"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])


OPTIONS = LionOptions


class Lion(torch.optim.Optimizer):
    def prepare(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("exp_avg", torch.zeros_like(p))

    @torch.no_grad()
    def step(self, closure=None):
        self.prepare()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p]["exp_avg"]
                direction = average.mul(first).add_(p.grad, alpha=1 - first).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] / 10)
                average.lerp_(p.grad, 1 - second)


class LionKind:
    def __init__(self, config):
        self._options = config.optimizer

    def refuse(self, model, topology):
        pass

    def bytes_of(self, shape):
        return 4.0 * shape.numel()

    def make(self, groups, shapes):
        return Lion(groups, {"lr": self._options.lr, "betas": tuple(self._options.betas), "weight_decay": 0.0})

    def goes_on_from(self, other):
        return other == "lion"

    def about(self, model):
        return "Lion"
'''


# A store and a reducer are no choices with options: their files say what they are.

TABLE = '''
"""A store in a table of SQLite, which many processes may write: `table:///PATH/OF/A/FILE.db`."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from checkpointing import DamagedError, NotFoundError


class Table:
    def __init__(self, rest):
        self._place = f"table://{rest}"
        path, _, below = rest.partition(".db")
        self._path, self._below = path + ".db", below.strip("/") and below.strip("/") + "/"

    def __str__(self):
        return self._place

    def _do(self, what, *values):
        with closing(sqlite3.connect(self._path, timeout=60)) as table, table:
            table.execute("CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, data BLOB)")
            return table.execute(what, values).fetchall()

    def put(self, name, chunks):
        data = b"".join(bytes(chunk) for chunk in chunks)
        self._do("REPLACE INTO objects VALUES (?, ?)", self._below + name, data)

    def read_ranges(self, name, ranges):
        found = self._do("SELECT data FROM objects WHERE name = ?", self._below + name)
        if not found:
            raise NotFoundError(f"{name} is not in {self}")
        ((data,),) = found
        if any(stop > len(data) for _, stop in ranges):
            raise DamagedError(f"{name} has {len(data)} bytes")
        return [bytearray(data[start:stop]) for start, stop in ranges]

    def list(self, prefix=""):
        rows = self._do("SELECT name, length(data) FROM objects ORDER BY name")
        begins, cut = self._below + prefix, len(self._below)
        return {name[cut:]: size for name, size in rows if name.startswith(begins)}

    def create_if_absent(self, name, data):
        try:
            self._do("INSERT INTO objects VALUES (?, ?)", self._below + name, bytes(data))
        except sqlite3.IntegrityError:
            return False
        return True

    def delete(self, names):
        for name in names:
            self._do("DELETE FROM objects WHERE name = ?", self._below + name)


STORE = Table
'''

WIDE = '''
"""Gradients are summed in fp64, whatever they are computed in."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


class Wide:
    def __init__(self, mesh):
        self._mesh = mesh
        self._left_to_us = False

    def attach(self, called):
        if isinstance(called, DistributedDataParallel):
            called.register_comm_hook(None, _leave)
            self._left_to_us = True
        for module in called.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_InFp64())

    def finish(self, gradients):
        if self._left_to_us:
            group = self._mesh.group("dp_replicate")
            for gradient in gradients.values():
                wide = gradient.double()
                dist.all_reduce(wide, group=group)
                gradient.copy_(wide / dist.get_world_size(group))

    def sum(self, values, *axes):
        return self._mesh.sum(values, *axes)


def _leave(state, bucket):
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class _InFp64:
    def allocate(self, size, *, dtype, device):
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        wide = input_tensor.double()
        dist.all_reduce(wide, op=op, group=group)
        output_tensor.copy_(wide.chunk(dist.get_world_size(group))[dist.get_rank(group)])


REDUCER = Wide
'''


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of a plug-in outlives its test."""
    for group, known in CHOICES.items():
        monkeypatch.setitem(CHOICES, group, dict(known))
    monkeypatch.setattr(stores, "STORES", dict(stores.STORES))
    monkeypatch.setattr(stores, "_files", dict(stores._files))
    before = dict(REDUCERS)
    yield
    REDUCERS.clear()
    REDUCERS.update(before)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A configuration directory with a method, an optimizer, a store and a reducer of its own."""
    for group, name, code, yaml in (
        ("method", "gains", GAINS, "defaults:\n  - /schema/method@_here_: gains\n  - _self_\n"),
        ("optimizer", "lion", LION, "defaults:\n  - /schema/optimizer@_here_: lion\n  - _self_\n"),
        ("checkpoint", "table", TABLE, "dir: table://${run.dir}.db\n"),
        ("parallel", "wide", WIDE, "reducer: wide\n"),
    ):
        place = tmp_path / "mine" / group
        place.mkdir(parents=True)
        (place / f"{name}.py").write_text(code)
        (place / f"{name}.yaml").write_text(yaml)
    return tmp_path / "mine"


def words(directory: Path) -> list[str]:
    return ["--config-dir", str(directory)]


def test_its_options_are_checked_saved_and_read_like_any(directory: Path) -> None:
    config = compose([*words(directory), "method=gains", "method.from_layer=2", "optimizer=lion"])
    assert type(config.method).__name__ == "GainOptions" and config.optimizer.betas == [0.9, 0.99]
    assert from_json(as_json(config)) == config
    with pytest.raises(Refused, match=r"method\.from_layer=-1 must be at least 0"):
        compose([*words(directory), "method=gains", "method.from_layer=-1"])
    with pytest.raises(Refused, match=r"method\.from_layer is an option of method=gains only"):
        compose([*words(directory), "method.from_layer=1"])
    with pytest.raises(ValueError, match=r"method=stranger is not known here; --config-dir DIRECTORY"):
        from_json({**as_json(config), "choices": {**as_json(config)["choices"], "method": "stranger"}})


@pytest.mark.parametrize(
    ("group", "code", "why"),
    [
        ("method", "import nowhere_at_all", r"method/other\.py cannot be imported: No module named 'nowhere_at_all'"),
        ("method", "OPTIONS = 3", r"must be a dataclass below trainer\.options\.method\.MethodOptions"),
        ("method", "x = 3", r"method/other\.py has no OPTIONS"),
        ("checkpoint", "x = 3", r"checkpoint/other\.py has no STORE"),
        ("checkpoint", "STORE = 3", r"checkpoint/other\.py has no STORE, the class"),
        ("parallel", "x = 3", r"parallel/other\.py has no REDUCER"),
        (
            "method",
            "from dataclasses import dataclass, field\nfrom trainer.options.method import MethodOptions\n"
            "@dataclass\nclass OPTIONS(MethodOptions):\n    size: int = field(kw_only=True)",
            "must have a default for every option",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(directory: Path, group: str, code: str, why: str) -> None:
    (directory / group).mkdir(exist_ok=True)
    (directory / group / "other.py").write_text(code)
    (directory / group / "other.yaml").write_text("{}")
    with pytest.raises(Refused, match=why):
        compose(words(directory))
    (directory / group / "other.yaml").unlink()  # alone it is somebody's module, and none of ours
    (directory / "src").mkdir()
    (directory / "src" / "train.py").write_text("raise SystemExit")
    (directory / "src" / "train.yaml").write_text("{}")  # and src is no group
    compose(words(directory))


def test_a_name_that_is_taken_is_refused(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for group in ("checkpoint", "parallel"):
        shutil.rmtree(directory / group)
    shutil.copytree(directory, other)
    with pytest.raises(Refused, match=r"cannot be method=gains: .*mine/method/gains\.py is that already\. Rename"):
        compose([*words(directory), *words(other)])
    for name in ("s2ft", "sparse"):  # a YAML of the project's, and a schema
        shutil.copytree(directory, tmp_path / name)
        for ending in (".py", ".yaml"):
            (tmp_path / name / "method" / f"gains{ending}").rename(tmp_path / name / "method" / f"{name}{ending}")
        with pytest.raises(Refused, match=rf"cannot be method={name}: the project has that already"):
            compose(words(tmp_path / name))


def test_a_yaml_without_its_options_is_told_so(directory: Path) -> None:
    for text, why in (
        ("from_layer: 1\n", "The YAML of method=gains sets from_layer, which is none of its options"),
        ("{}\n", "The options of method are those of no choice"),
    ):
        (directory / "method" / "gains.yaml").write_text(text)
        with pytest.raises(Refused, match=rf"{why}.*- /schema/method@_here_: NAME"):
            compose([*words(directory), "method=gains"])


@pytest.mark.parametrize("flag", [["--config-dir="], ["--config-dir"], ["-cd", "/nowhere/at/all"]])
def test_a_directory_that_is_none_is_refused(flag: list[str]) -> None:
    with pytest.raises(Refused, match=r"is no directory\. Give one that holds configurations"):
        compose(flag)


def test_what_one_choice_is_free_to_change_another_is_not(directory: Path) -> None:
    """Another method has an option of the same name, which is free."""
    code = GAINS.replace("from_layer: int = option(0, low=0)", "density: float = option(0.1, low=0, free=True)")
    (directory / "method" / "gains.py").write_text(code)
    assert is_free(compose([*words(directory), "method=gains"]), "method.density")
    assert not is_free(compose([*words(directory), "method=lift"]), "method.density")


def test_an_optimizer_that_a_method_would_not_use_is_refused(directory: Path) -> None:
    with pytest.raises(Refused, match=r"optimizer=lion would not be used: method=lift has an optimizer of its own"):
        compose([*words(directory), "method=lift", "optimizer=lion"])
    compose([*words(directory), "method=s2ft", "optimizer=lion"])


def test_a_text_is_a_text_however_it_is_annotated(directory: Path) -> None:
    code = GAINS.replace("from __future__ import annotations\n", "").replace(
        "    from_layer: int", '    note: str = ""\n    from_layer: int'
    )
    (directory / "method" / "gains.py").write_text(code)
    config = compose([*words(directory), "method=gains", "method.note=1e-5"])
    assert config.method.note == "1e-5"  # type: ignore[attr-defined]


def test_a_method_passes_conformance(directory: Path, tmp_path: Path, world: SharedWorld) -> None:
    method = str(directory / "method" / "gains.yaml")
    conformance.test_the_output_is_the_bases_at_the_start(method)
    conformance.test_merged_reverted_and_counted(method, tmp_path / "merged")
    conformance.test_a_run_goes_through_every_engine_as_if_it_had_stayed(method, tmp_path, world)


def resumed(overrides: list[str], source: Path | str, again: Path | str) -> dict[str, Any]:
    return resume(overrides, source, again, control=True)


def test_an_optimizer_goes_through_the_matrix(directory: Path, tmp_path: Path, world: SharedWorld) -> None:
    chosen = [*words(directory), "optimizer=lion"]
    layouts = ["single", "ddp", "fsdp on 3", "tp", "pp", "zero 1", "zero 3"]
    expected = start(chosen).train(1, 2 * STEPS)
    for layout in layouts:
        size, overrides = LAYOUTS[layout]
        losses = world.run(train_and_save, size, [*chosen, *overrides], tmp_path / layout)[0]["losses"]
        assert furthest(losses, expected[:STEPS]) < 1e-5
    for target, source in zip(layouts, [*layouts[3:], *layouts[:3]], strict=True):
        size, overrides = LAYOUTS[target]
        again = tmp_path / f"{source} to {target}"
        found = world.run(resumed, size, [*chosen, *overrides], tmp_path / source, again)[0]
        assert found["same_forward"] and contents_differ(tmp_path / source, again) == []
        assert furthest(found["losses"], expected[STEPS:]) < 1e-5 < furthest(found["control"], found["losses"])


LAYOUTS_OF_DATA = ["single", "ddp", "fsdp on 3", "hsdp 2x2", "tp", "pp x ddp", "pp x fsdp"]


def losses_of(overrides: list[str]) -> list[float]:
    return start(overrides).train(1, STEPS)


def test_a_reducer_goes_through_the_matrix(directory: Path, tmp_path: Path, world: SharedWorld) -> None:
    """One that forgets to reduce is the control."""
    file = directory / "parallel" / "lazy.py"
    file.write_text(WIDE.replace("dist.all_reduce(wide", "(lambda *_, **__: None)(wide"))
    file.with_suffix(".yaml").write_text("reducer: lazy\n")
    expected = start([]).train(1, 2 * STEPS)
    for layout in LAYOUTS_OF_DATA:
        size, overrides = LAYOUTS[layout]
        chosen = [*words(directory), *overrides]
        wide = world.run(train_and_save, size, [*chosen, "parallel.reducer=wide"], tmp_path / "wide" / layout)[0]
        assert furthest(wide["losses"], expected[:STEPS]) < 1e-5, layout
        lazy = world.run(losses_of, size, [*chosen, "parallel.reducer=lazy"])[0]
        assert (furthest(lazy, expected[:STEPS]) < 1e-5) == (layout in ("single", "tp")), layout
    for target, source in zip(LAYOUTS_OF_DATA, [*LAYOUTS_OF_DATA[3:], *LAYOUTS_OF_DATA[:3]], strict=True):
        size, overrides = LAYOUTS[target]
        reduced = [*words(directory), *overrides, "parallel.reducer=wide"]
        found = world.run(resumed, size, reduced, tmp_path / "wide" / source, tmp_path / f"{source} to {target}")[0]
        assert found["same_forward"] and furthest(found["losses"], expected[STEPS:]) < 1e-5


def test_another_reducer_is_another_result(directory: Path) -> None:
    assert not is_free(config := compose([*words(directory), "parallel=wide"]), "parallel.reducer")
    assert is_free(config, "parallel.tp") and config.parallel.reducer == "wide"
    with pytest.raises(Refused, match=r"parallel\.reducer=narrow is none of plain, wide"):
        compose([*words(directory), "parallel.reducer=narrow"])
    with pytest.raises(Refused, match="DeepSpeed reduces gradients itself"):
        compose([*words(directory), "parallel=zero1", "parallel.reducer=wide"])


@pytest.mark.parametrize(
    ("words_", "why"),
    [
        (["checkpoint.dir=s3://bucket/x"], r"no store is called 's3'.*Type --config-dir DIRECTORY"),
        (["checkpoint.dir=S3://bucket/x"], r"no store is called 'S3'"),
        (["checkpoint.dir=memory://x"], "would be gone with the process"),
    ],
)
def test_a_store_that_keeps_nothing_is_refused(words_: list[str], why: str) -> None:
    with pytest.raises(Refused, match=why):
        compose(words_)


def test_a_store_under_the_name_of_another_is_refused(directory: Path) -> None:
    table = directory / "checkpoint" / "table.py"
    for name in ("file", "S3"):
        for ending in (".py", ".yaml"):
            (table.parent / f"{name}{ending}").write_text(table.with_suffix(ending).read_text())
        with pytest.raises(Refused, match=rf"{name}\.py: .*Rename the file"):
            compose(words(directory))
        for ending in (".py", ".yaml"):
            (table.parent / f"{name}{ending}").unlink()


def test_a_reducer_may_be_made_elsewhere(directory: Path) -> None:
    file = directory / "parallel" / "wide.py"
    file.write_text("from trainer.parallel.reducing import PlainReducer as Other\nREDUCER = Other\n")
    assert start([*words(directory), "parallel=wide"]).train(1, 1) == start([]).train(1, 1)
    file.write_text("REDUCER = 3\n")
    with pytest.raises(Refused, match="must be the class of a reducer"):
        compose(words(directory))


def test_a_store_goes_through_the_matrix(directory: Path, tmp_path: Path, world: SharedWorld) -> None:
    layouts = ["single", "ddp", "fsdp on 3", "tp", "pp", "zero 1", "zero 3"]
    expected = start(words(directory)).train(1, 2 * STEPS)
    for layout in layouts:
        size, overrides = LAYOUTS[layout]
        found = world.run(train_and_save, size, [*words(directory), *overrides], f"table://{tmp_path}/{layout}.db")[0]
        assert found["wrong"] == []
    for target, source in zip(layouts, [*layouts[3:], *layouts[:3]], strict=True):
        size, overrides = LAYOUTS[target]
        here, again = f"table://{tmp_path}/{source}.db", f"table://{tmp_path}/{source} to {target}.db"
        found = world.run(resumed, size, [*words(directory), *overrides], here, again)[0]
        assert found["same_forward"] and contents_differ(here, again) == []
        assert furthest(found["losses"], expected[STEPS:]) < 1e-5 < furthest(found["control"], found["losses"])


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("every", [0, 1], ids=["saved", "from memory"])
def test_a_whole_run_keeps_its_checkpoints_in_a_store(every: int, directory: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    memory = [f"checkpoint.memory.every={every}", f"checkpoint.memory.dir={tmp_path / 'memory'}"]
    common = [*SMALL, "checkpoint=table", "checkpoint.every=2", f"run.dir={run}", *memory, *words(directory)]
    done = launch(2, [*common, "train.steps=4"])
    assert done.returncode == 0, done.stderr
    assert not (run / "checkpoints").exists() and (tmp_path / "run.db").is_file()
    again = launch(1, [*common, "parallel=fsdp", "train.steps=6"])
    assert again.returncode == 0 and [row["step"] for row in rows(run)] == [*range(1, 7)], again.stderr
    assert f"table://{run}.db/step-00000004" in again.stdout
    place, store = f"table://{run}.db", str(directory / "checkpoint" / "table.py")
    listed = trainer("ls", place, "--store", store, "--json", module="checkpointing")
    generations = json.loads(listed.stdout)["generations"]
    assert [g["step"] for g in generations if g["state"] == "committed"] == [6, 4], listed.stderr
    assert trainer("verify", place, "--store", store, module="checkpointing").returncode == 0
    counted = trainer("stats", str(run), *words(directory), module="trainer.methods")
    assert counted.returncode == 0 and "changed" in counted.stdout, counted.stderr
    status = trainer("status", str(run), module="launch").stdout
    assert f"step 6 in {place}, by the run's word" in status
    lost = launch(1, [*(word for word in common if word not in words(directory)), "train.steps=8"])
    assert lost.returncode == 2 and "checkpoint=table" in lost.stderr, lost.stderr
    unknown = trainer("ls", place, module="checkpointing")
    assert unknown.returncode == 2 and "no store is called 'table'. Known are file, memory" in unknown.stderr


@pytest.mark.usefixtures("processes")
def test_a_whole_run_with_both_is_launched_resumed_and_merged(directory: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = [*SMALL, "method=gains", "optimizer=lion", "train.steps=4", f"run.dir={run}", *words(directory)]
    done = launch(2, [*common, "checkpoint.every=2"])
    assert done.returncode == 0 and "Lion, lr" in done.stdout and "method=gains trains" in done.stdout, done.stderr
    again = launch(1, [*common, "parallel=fsdp", "train.steps=6"])
    assert again.returncode == 0 and [row["step"] for row in rows(run)] == [*range(1, 7)], again.stderr
    other = launch(1, [*[word for word in common if word != "optimizer=lion"], "train.steps=8"])
    assert other.returncode == 2, other.stdout
    assert "saved with optimizer=lion, whose moments cannot be loaded for fused" in other.stderr
    unknown = trainer("merge", str(run), str(tmp_path / "out"), module="trainer.methods")
    assert unknown.returncode == 2 and "method=gains is not known here" in unknown.stderr
    merged = trainer("merge", str(run), str(tmp_path / "out"), *words(directory), module="trainer.methods")
    assert merged.returncode == 0 and (tmp_path / "out" / "model.safetensors").is_file(), merged.stderr


@pytest.mark.parametrize(
    "order",
    [
        ["--cfg", "job", "--config-dir", "{}", "method=gains", "train.steps=7"],
        ["--config-dir={}", "method=gains", "--cfg", "job", "train.steps=7"],
        ["method=gains", "--config-dir", "{}", "train.steps=7", "--cfg", "job"],
    ],
)
def test_the_flag_may_stand_anywhere(
    directory: Path, order: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", *(word.format(directory) for word in order)])
    assert compose_from_command_line() is None
    shown = capsys.readouterr().out
    assert "from_layer: 0" in shown and "steps: 7" in shown


def test_a_configuration_of_ones_own_and_a_second_directory(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "mine.yaml").write_text("defaults:\n  - config\n  - _self_\ntrain:\n  steps: 5\n")
    second = tmp_path / "second" / "schedule"
    second.mkdir(parents=True)
    (second / "flat.yaml").write_text("curve: constant\nwarmup_steps: 1\n")
    both = ["--config-dir", str(directory), "--config-dir", str(second.parent)]
    monkeypatch.setattr(sys, "argv", ["trainer", "--config-name", "mine", *both, "method=gains", "schedule=flat"])
    config = compose_from_command_line()
    assert config is not None and (config.train.steps, config.schedule.warmup_steps) == (5, 1)
    other = compose([*both, "method=gains", "schedule=flat"])
    assert other.schedule.warmup_steps == 1 and type(other.method) is type(config.method)
