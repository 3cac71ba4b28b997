"""Compiled layers compute and draw as they would otherwise; broken graphs are counted, nothing falls back silently."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_torch_engine import train_steps
from trainer.compose import compose
from trainer.errors import Refused, TrainingFailed
from trainer.parallel.compiling import RECOMPILE_LIMIT, Compiled, check_compiling

COMMON = ["train.global_batch=10", "train.micro_batch=2"]
QUICK = ["parallel.compile=true", "parallel.compile_backend=aot_eager"]  # traced and taken apart, not made into C++


def steps(overrides: list[str]) -> dict[str, Any]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        found = train_steps([*COMMON, *overrides])
    return {**found, "said": output.getvalue()}


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, ["parallel=ddp"]),
        (3, ["parallel=fsdp", "parallel.activation_checkpointing=true"]),
        (4, ["parallel=tp", "parallel.dp_shard=2"]),
        (2, ["parallel=pp", "parallel.pp_schedule=interleaved", "model.num_layers=5"]),
        (2, ["parallel=accelerate"]),
    ],
)
def test_compiled_layers_compute_the_same_under_every_layout(size: int, layout: list[str], world: SharedWorld) -> None:
    alone = steps([option for option in layout if option.startswith("model.")])
    results = world.run(steps, size, [*layout, *QUICK])
    for found in results:
        np.testing.assert_allclose(found["rows"], alone["rows"], rtol=2e-5)
        assert found["eval"] == pytest.approx(alone["eval"], rel=1e-5)
        assert [part[0] for part in found["parts"]] and not any("_orig_mod" in part[0] for part in found["parts"])
    said = [found["said"] for found in results]
    if "parallel=pp" in layout:
        assert all(f"pipeline rank {n}: 1 graphs, 0 graph breaks" in text for n, text in enumerate(said))
    else:
        assert "  compiled   1 graphs, 0 graph breaks\n" in said[0] and set(said[1:]) == {""}


@pytest.mark.usefixtures("processes")
def test_code_made_for_this_machine_draws_the_same_dropout() -> None:
    """The default backend would draw by generators of its own."""
    assert shutil.which("g++") or shutil.which("clang++")
    model = ["model.num_layers=1", "model.dropout=0.2"]
    plain, made = steps(model), steps([*model, "parallel.compile=true"])
    np.testing.assert_allclose(made["rows"], plain["rows"], rtol=2e-5)
    assert "0 graph breaks" in made["said"]
    other = steps([*model, "model.dropout=0.21"])  # the comparison sees dropout
    assert not np.allclose(other["rows"], plain["rows"], rtol=2e-5)


class Broken(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        doubled = inputs * 2
        torch._dynamo.graph_break()
        return doubled + 1


class Picky(nn.Module):
    def forward(self, inputs: torch.Tensor, kind: str) -> torch.Tensor:
        return inputs + len(kind) * (2 if kind == "a" else 3)


def test_graph_breaks_are_counted_and_told() -> None:
    layers = [Broken(), Broken()]
    compiled = Compiled(layers, "eager")
    assert compiled.news() is None
    for layer in layers:
        assert layer(torch.ones(2)).tolist() == [3, 3]
    news = compiled.news()
    assert news is not None and re.fullmatch(r"2 graphs, 1 graph breaks: 1 x .*graph_break.*", news)
    layers[0](torch.ones(2))
    assert compiled.news() is None  # nothing new
    layers[0](torch.ones(2, dtype=torch.float64))
    assert (compiled.news() or "").startswith("2 graphs")  # made again for other inputs


@pytest.mark.usefixtures("long")
def test_going_on_uncompiled_is_an_error_and_not_a_silence() -> None:
    layer = Picky()
    Compiled([layer], "eager")
    with pytest.raises(TrainingFailed, match=r"parallel\.compile=false goes on"):
        for number in range(RECOMPILE_LIMIT + 2):
            layer(torch.ones(1), kind=str(number))


@pytest.mark.usefixtures("long")
def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, on = torch.device("cpu"), "parallel.compile=true"
    check_compiling(compose([on]), cpu)
    with pytest.raises(Refused, match=r"does not go with DeepSpeed.* parallel=fsdp"):
        check_compiling(compose([on, "parallel=zero3"]), cpu)
    with pytest.raises(Refused, match=r"compile_backend=nonsense is not one of this torch's: .*inductor"):
        check_compiling(compose([on, "parallel.compile_backend=nonsense"]), cpu)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(
        Refused, match=r"for the CPU, and there is none of g\+\+, clang\+\+ here.*parallel\.compile=false"
    ):
        check_compiling(compose([on]), cpu)
    with pytest.raises(Refused, match=r"for the GPU, and there is none of gcc, cc, clang here"):
        check_compiling(compose([on]), torch.device("cuda", 0))
    with pytest.raises(Refused, match=r"optimizer=adamw_8bit needs a compiler.* type optimizer\.implementation=fused"):
        check_compiling(compose(["optimizer=adamw_8bit"]), cpu)
    check_compiling(compose([on, "parallel.compile_backend=aot_eager"]), cpu)
    check_compiling(compose([]), cpu)
