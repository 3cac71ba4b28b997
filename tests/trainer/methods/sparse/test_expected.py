"""What a plan counts with, against what a run then has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.harness.models import save_tiny_model
from trainer.compose import compose
from trainer.methods import build
from trainer.methods.selection.choosing import Ranks
from trainer.methods.sparse.attach import PROMOTED, attach, select
from trainer.methods.sparse.expected import expected_sizes, needs_of, share_below
from trainer.models import build_model
from trainer.options.method import Sparse

ALONE = Ranks.of(None, torch.device("cpu"))


def both(*overrides: str) -> tuple[int, int]:
    """Entries expected, and selected."""
    config = compose(["method=sara", *overrides])
    assert isinstance(config.method, Sparse)
    expected = sum(expected_sizes(build_model(config.model, seq_len=8, seed=0, device="meta"), config.method).values())
    made = attach(build_model(config.model, seq_len=8, seed=0), config.method, 0)
    return expected, sum(one.numel() for one in select(made, config.method, 0, ALONE)[0].values())


@pytest.mark.parametrize("threshold", [2e-4, 2e-3, 1.0])
def test_below_a_threshold_of_random_weights(threshold: float) -> None:
    expected, found = both(f"method.threshold={threshold}")
    assert expected == pytest.approx(found, rel=0.05)


def test_below_a_threshold_of_what_a_models_files_hold(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    model: Any = build_model(compose(["model=hf", f"model.path={tmp_path}"]).model, seq_len=8, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(15 if name.endswith("down_proj.weight") else 5 if name.endswith("proj.weight") else 0)
    model.save_pretrained(tmp_path)
    expected, found = both("model=hf", f"model.path={tmp_path}")
    assert expected == pytest.approx(found, rel=0.2)  # of a sample
    begun = share_below(2e-3, build_model(compose([]).model, seq_len=8, seed=0, device="meta"), ["q_proj"])
    assert begun == pytest.approx(0.08, abs=0.005)  # the control: by how weights begin it would be five times as much
    assert expected < 0.5 * begun * sum(p.numel() for n, p in model.named_parameters() if "proj" in n)


def test_files_that_cannot_be_read_are_no_reason_to_fail(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    model = build_model(compose(["model=hf", f"model.path={tmp_path}"]).model, seq_len=8, seed=0, device="meta")
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    assert share_below(2e-3, model, ["model.layers.0.self_attn.q_proj"]) == pytest.approx(0.08, abs=0.005)


def test_weights_that_are_hit_often_get_a_pair() -> None:
    made = build(compose(["method=spt", "model.hidden_size=384", "model.intermediate_size=1376"]), "meta")
    assert any(name.endswith("lora_A.weight") for name, _ in made.named_parameters())
    options = compose(["method=spt", "method.promote_rank=0"]).method
    assert isinstance(options, Sparse)
    whole = build_model(compose([]).model, seq_len=8, seed=0, device="meta")
    assert PROMOTED not in expected_sizes(whole, options).values()


def test_only_what_selects_in_the_run_needs_more_than_a_step() -> None:
    model = build(compose(["method=spiel"]), "meta")

    def needed(name: str) -> int:
        options = compose([f"method={name}"]).method
        assert isinstance(options, Sparse)
        return needs_of(model, options).beyond(10**9, 10**8, 10**7)

    assert needed("random_sparse") == needed("s2ft") == 0
    assert 0 < needed("spiel") < needed("spt")


def test_selecting_anew_counts_where_a_step_needs_less() -> None:
    options = compose(["method=lift"]).method
    assert isinstance(options, Sparse)
    needs = needs_of(build(compose(["method=lift"]), "meta"), options)
    assert needs.beyond(10**9, 10**8, 10**7) == 0
    assert needs.beyond(10**8, 10**8, 10**7) > 8 * needs.weight


def test_only_matrices_of_that_very_name_count(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    model = build_model(compose(["model=hf", f"model.path={tmp_path}"]).model, seq_len=8, seed=0, device="meta")
    others = {"foo_q_proj.weight": torch.zeros(50, 50), "a.q_proj.weight": torch.tensor(0.0)}
    save_file({**others, "b.q_proj.weight": torch.full((40, 3), 1.0)}, tmp_path / "model.safetensors")
    assert share_below(2e-3, model, ["model.layers.0.self_attn.q_proj"]) == 0
