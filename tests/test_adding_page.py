"""docs/adding.md: its method trains as written, and every file that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.harness.processes import ROOT
from tests.harness.runs import SMALL, rows, train
from trainer.errors import Refused
from trainer.methods import method_of
from trainer.methods.method import Method
from trainer.methods.tuned_runs import Tuned
from trainer.optimizers.optimizer import OptimizerKind
from trainer.options.config import CHOICES

PAGE = (ROOT / "docs" / "adding.md").read_text()


def test_its_method_trains_and_its_checkpoint_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (yaml,) = re.findall(r"((?:    .*\n)*    defaults:\n(?:    .*\n)+)", PAGE)
    place = tmp_path / "mine" / "method"
    place.mkdir(parents=True)
    (place / "gains.py").write_text(code)
    (place / "gains.yaml").write_text("\n".join(line[4:] for line in yaml.splitlines()))
    monkeypatch.setitem(CHOICES, "method", dict(CHOICES["method"]))
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
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
    section = PAGE[PAGE.index("## A method") : PAGE.index("## An optimizer")]
    named = {name for row in section.splitlines() if row.startswith("| ") for name in re.findall(r"`(\w+)`", row)}
    parts = {name for name in vars(Method) if not name.startswith("_")}
    assert named - {"Rebuild"} <= parts
    # Those that a method need not know of are called for every one alike.
    assert parts - named == {"freezes", "placed", "left", "prepare_base"}
    assert hasattr(OptimizerKind, "make")
