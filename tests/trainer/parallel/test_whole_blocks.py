"""A layout that would cut blocks of 8-bit moments is refused on every process alike, with one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.parallel.zoo import save_model
from trainer.compose import compose
from trainer.errors import Refused
from trainer.methods import build
from trainer.parallel.tensor import shares_of
from trainer.parallel.whole_blocks import check_blocks, cut_within
from trainer.parallel.world import World
from trainer.run import pick_device, read

MODEL = ["model.hidden_size=512", "model.num_heads=4", "model.num_kv_heads=4", "model.num_layers=2"]


def meta(*overrides: str) -> object:
    return build(compose([*MODEL, *overrides]), "meta")


def test_shares_that_only_some_ranks_would_hold_in_part_are_found() -> None:
    model = meta("model.intermediate_size=768")
    runs = [cuts.held["model.layers.0.self_attn.o_proj.weight"].ranges[-1] for cuts in shares_of(model, 3)]
    assert runs == [[(0, 256)], [(256, 128)], [(384, 128)]]  # the first has a whole block
    before = {name: p.shape for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    with pytest.raises(
        Refused, match=r"parallel\.tp=3 cuts the rows of model\.layers\.0\.self_attn\.o_proj\.weight at 384"
    ):
        check_blocks(model, 3)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"Type parallel\.tp=1, or optimizer\.implementation=fused"):
        check_blocks(model, 2)  # type: ignore[arg-type]  # 384 of the inner width
    assert {name: p.shape for name, p in model.named_parameters()} == before  # type: ignore[attr-defined]
    fits = meta("model.intermediate_size=1024")
    check_blocks(fits, 2)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"Type parallel\.tp=2, or"):
        check_blocks(fits, 4)  # type: ignore[arg-type]
    assert cut_within(fits, 1) is None  # type: ignore[arg-type]
    small = meta("model.intermediate_size=768", "method=lora", "method.r=4")  # what is frozen has no moments
    assert cut_within(small, 2) is None  # type: ignore[arg-type]


@pytest.mark.usefixtures("long")
def test_the_run_refuses_it_before_it_reads_anything(tmp_path: Path) -> None:
    common = [*MODEL, "model.intermediate_size=768", "parallel.tp=2", f"run.dir={tmp_path}"]
    world = World(0, 2, 0, 2)
    for kind in ("adamw_8bit", "adamw"):
        config = compose([*common, f"optimizer={kind}"])
        if kind == "adamw":
            read(config, world, pick_device(World()))
        else:
            with pytest.raises(Refused, match="within such a block"):
                read(config, world, pick_device(World()))


def test_every_familys_shares_are_known_from_shapes_alone(tmp_path: Path) -> None:
    for name in ("gpt2", "mixtral", "phi3"):
        save_model(tmp_path / name, name)
        model = build(compose(["model=hf", f"model.path={tmp_path / name}", "train.seq_len=8"]), "meta")
        assert all(cuts.held for cuts in shares_of(model, 2))
