"""docs/adding.md: its method, store and reducer train as written, and every file that it names is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpointing import find, stores
from tests.harness.processes import ROOT
from tests.harness.runs import SMALL, rows, train
from trainer.errors import Refused
from trainer.methods import method_of
from trainer.methods.method import Method
from trainer.methods.tuned_runs import Tuned
from trainer.optimizers.optimizer import OptimizerKind
from trainer.options.config import CHOICES
from trainer.options.parallel import REDUCERS, Parallel
from trainer.parallel.mesh import Mesh
from trainer.parallel.reducing import make_reducer
from trainer.plan import Topology

PAGE = (ROOT / "docs" / "adding.md").read_text()


def code_of(section: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0], re.S)
    return str(code)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process, and nothing of a plug-in outlives its test."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(stores, "STORES", dict(stores.STORES))
    monkeypatch.setattr(stores, "_files", {})
    before = dict(REDUCERS)
    yield
    REDUCERS.clear()
    REDUCERS.update(before)


@pytest.mark.usefixtures("long")
def test_its_store_and_its_reducer_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for group, name, section, yaml in (
        ("checkpoint", "scratch", "A store", "dir: scratch://${run.name}\n"),
        ("parallel", "watched", "A reducer", "reducer: watched\n"),
    ):
        assert yaml.strip() in PAGE
        place = tmp_path / "mine" / group
        place.mkdir(parents=True)
        (place / f"{name}.py").write_text(code_of(section))
        (place / f"{name}.yaml").write_text(yaml)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "elsewhere"))
    words = ["--config-dir", str(tmp_path / "mine"), "checkpoint=scratch", "parallel=watched", "run.name=mine"]
    for steps in (2, 4):
        train([*SMALL, *words, f"train.steps={steps}", f"run.dir={tmp_path / 'run'}"])
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    generations = find("scratch://mine").candidates
    assert [g.step for g in generations] == [4, 2] and (tmp_path / "elsewhere" / "mine").is_dir()
    reducer = make_reducer(Parallel(reducer="watched"), Mesh(Topology(), 0, None))
    with pytest.raises(ArithmeticError, match="the gradient of w is no number"):
        reducer.finish({"v": torch.ones(1), "w": torch.tensor([float("nan")])})


def test_its_method_trains_and_its_checkpoint_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_of("A method")
    (yaml,) = re.findall(r"((?:    .*\n)*    defaults:\n(?:    .*\n)+)", PAGE)
    place = tmp_path / "mine" / "method"
    place.mkdir(parents=True)
    (place / "gains.py").write_text(code)
    (place / "gains.yaml").write_text("\n".join(line[4:] for line in yaml.splitlines()))
    monkeypatch.setitem(CHOICES, "method", dict(CHOICES["method"]))
    words = ["--config-dir", str(tmp_path / "mine"), "method=gains"]
    train([*SMALL, *words, "train.steps=2", f"run.dir={tmp_path / 'run'}"])
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    run = Tuned.open(tmp_path / "run")
    assert all(name.endswith(".gain") for name in run.names if name.startswith("model/"))
    # Merged it is another model than the base, and a method that does not say how it is merged is not.
    merged, base = dict(run.merged().named_parameters()), dict(run.base().named_parameters())
    assert [name for name in base if not torch.equal(merged[name], base[name])] and run.delta().count
    monkeypatch.delattr(type(method_of(run.config)), "merged")
    with pytest.raises(Refused, match=r"trains parameters that the base has not, such as .*\.gain, and does not say"):
        run.merged()


def test_every_file_and_every_part_of_a_contract_that_it_names_is_there() -> None:
    paths = {
        path for path in re.findall(r"`((?:trainer|checkpointing|conf|tests)/[\w/.]+)`", PAGE) if "NAME" not in path
    }
    assert len(paths) > 8 and [path for path in paths if not (ROOT / path).exists()] == []
    section = PAGE[PAGE.index("## A method") : PAGE.index("Options of a method tell")]
    named = {name for row in section.splitlines() if row.startswith("| ") for name in re.findall(r"`(\w+)`", row)}
    parts = {name for name in vars(Method) if not name.startswith("_")}
    assert named - {"Rebuild"} <= parts
    # Those that a method need not know of are called for every one alike.
    assert parts - named == {"freezes", "placed", "left", "prepare_base"}
    assert hasattr(OptimizerKind, "make")
