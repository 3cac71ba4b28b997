"""What one process can refuse, and the plan that it prints, before any process group starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness.runs import SMALL
from trainer import job
from trainer import run as run_module
from trainer.compose import compose
from trainer.errors import Refused
from trainer.job import check_vocabulary, lay_out, read_data
from trainer.methods import build
from trainer.optimizers.adamw import AdamWKind
from trainer.parallel.world import World
from trainer.plan import Topology
from trainer.run import run

BASE = [*SMALL, "train.steps=12"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(compose([*BASE, "dry_run=true", "train.global_batch=10", "method=lora"])) == 0
    plan = capsys.readouterr().out
    assert list(in_tmp.iterdir()) == []
    for expected in (
        "method=lora trains",
        "10 samples = 5 micro-batches of 2",
        "1 on cpu: one process",
        "about",
        "from scratch",
        "held out",
        "12; AdamW, lr 0.001",
    ):
        assert expected in plan


def test_a_vocabulary_smaller_than_the_data_needs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = job.build

    def smaller(*arguments: Any, **more: Any) -> Any:
        model: Any = original(*arguments, **more)
        model.set_input_embeddings(nn.Embedding(100, model.config.hidden_size, device="meta"))
        return model

    monkeypatch.setattr(job, "build", smaller)
    with pytest.raises(Refused, match=r"The data holds token \d+, and the model knows 100"):
        run(compose([*BASE, f"run.dir={tmp_path}"]))


def test_an_end_that_the_model_has_no_row_for_is_refused() -> None:
    """Rows are filled up with it, in whatever the data holds."""
    model: Any = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(100, 4))
    data: Any = SimpleNamespace(largest_token=99)
    check_vocabulary([data], model, 99)
    with pytest.raises(Refused, match=r"The token that ends and fills up is number 100, and the model knows 100"):
        check_vocabulary([data], model, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["parallel.compile=true", "parallel.compile_backend=nonsense"], "Type parallel.compile_backend=inductor"),
        (["parallel.compile=true", "parallel=zero1"], "Type parallel.compile=false"),
        (["optimizer.lr_scale=[nowhere:0.5]"], "optimizer.lr_scale names nowhere"),
    ],
)
def test_what_an_engine_could_not_do_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setattr(run_module, "process_group", None)
    with pytest.raises(Refused, match=message):
        run(compose([*BASE, f"run.dir={tmp_path / 'run'}", *options]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_epochs_become_steps() -> None:
    config, _, corpus, _ = read_data(compose([*BASE, "train.epochs=0.5"]))
    assert config.train.steps == -(-len(corpus.train) // (2 * config.train.global_batch))


def test_a_layout_is_chosen_and_its_memory_planned() -> None:
    config = compose([*BASE, "parallel=auto"])
    chosen, topology, memory, why = lay_out(config, build(config, "meta"), World(), torch.device("cpu"))
    assert topology.size == 1 and chosen.parallel.dp_shard == 1 and memory.total > 0
    assert why and "parallel=auto takes the first layout that fits" in why[0]


def test_an_optimizer_may_refuse_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AdamWKind, model: nn.Module, topology: Topology) -> None:
        raise Refused(f"not on {topology.size}")

    monkeypatch.setattr(AdamWKind, "refuse", refuse)
    config = compose(BASE)
    with pytest.raises(Refused, match="not on 1"):
        lay_out(config, build(config, "meta"), World(), torch.device("cpu"))
