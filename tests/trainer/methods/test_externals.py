"""The base's hashes: of every parameter once, shared by the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing import External, MismatchError, Piece, external_of, load
from tests.harness.engines import LAYOUTS, furthest, start
from tests.harness.worlds import SharedWorld
from tests.trainer.methods.conformance import overrides, save_to
from trainer.compose import compose
from trainer.methods import build, method_of
from trainer.methods.externals import externals_of
from trainer.methods.tuned_runs import Tuned

CONFIG = ["method=random_sparse", "model.num_layers=1"]


def declared(rank: int = 0, size: int = 1) -> list[External]:
    import torch.distributed as dist

    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    config = compose(CONFIG)
    return externals_of(build(config), method_of(config), rank, size)


def test_every_parameter_of_the_base_by_its_content() -> None:
    config = compose(CONFIG)
    model = build(config)
    found = {one.name: one for one in declared()}
    base = {n: p for n, p in model.named_parameters() if not method_of(config).adds(n)}
    assert found.keys() == {f"model/{name}" for name in base}
    assert found["model/lm_head.weight"] == external_of("model/lm_head.weight", base["lm_head.weight"], "seed 0")
    with torch.no_grad():
        base["lm_head.weight"][0, 0] += 1
    assert {one.name: one for one in externals_of(model, method_of(config), 0, 1)} != found


def test_ranks_hash_a_share_each_and_know_all(world: SharedWorld) -> None:
    assert world.run(declared, 3) == [declared()] * 3


TRAINS = {"lora": ("lora_",), "perp_selective": ("norm", "lm_head")}  # what is in the names of all that trains


def train_and_save(method: str, layout: str, directory: Path) -> list[float]:
    started = start([*overrides(method), *LAYOUTS[layout][1]])
    found = started.train(1, 2)
    save_to(directory / "both", started, 2)
    return [*found, *started.train(3, 4)]


def go_on(method: str, layout: str, directory: Path, forget: bool = False) -> list[float]:
    started = start([*overrides(method), *LAYOUTS[layout][1]])
    load(directory, started.training.pieces_for)
    if forget:
        for piece in started.training.pieces():
            if isinstance(piece, Piece) and piece.name.endswith("/exp_avg_sq"):
                piece.tensor.zero_()
    started.training.publish()
    return started.train(3, 4)


@pytest.mark.parametrize("layout", ["fsdp", "zero 3", "pp", "tp"])
@pytest.mark.parametrize("method", TRAINS)
def test_a_checkpoint_holds_what_trains_and_names_the_rest(
    method: str, layout: str, tmp_path: Path, world: SharedWorld
) -> None:
    losses = world.run(train_and_save, 2, method, layout, tmp_path)[0]
    directory = tmp_path / "both"
    manifest = Tuned.open(directory).manifest
    held = [name for name in manifest.tensors if name.startswith("model/")]
    assert held and all(any(part in name for part in TRAINS[method]) for name in held)
    assert {"model/model.embed_tokens.weight", "model/model.layers.0.mlp.up_proj.weight"} <= manifest.external.keys()
    assert furthest(go_on(method, "single", directory), losses[2:]) < 1e-5
    assert furthest(go_on(method, "single", directory, forget=True), losses[2:]) > 1e-5
    with pytest.raises(MismatchError, match="is not what the checkpoint was saved with"):
        load(directory, start(overrides(method), seed=1).training.pieces_for)


@pytest.mark.usefixtures("long")
def test_a_checkpoint_that_holds_the_base_goes_on(tmp_path: Path) -> None:
    """As one of a trainer that knew of no external tensors."""
    started: Any = start(overrides("lora"))
    started.training._frozen = []
    started.train(1, 2)
    save_to(tmp_path, started, 2)
    losses = started.train(3, 4)
    assert "model/lm_head.weight" in Tuned.open(tmp_path).manifest.tensors
    assert go_on("lora", "single", tmp_path) == losses


def test_what_methods_add_is_told_by_name() -> None:
    method = method_of(compose(["method=spt"]))
    assert method.adds("model.layers.0.mlp.up_proj.sparse_values") and method.adds("a.lora_A.weight")
    assert not method.adds("model.layers.0.mlp.up_proj.weight")
    assert method_of(compose(["method=lora"])).adds("a.lora_A.weight")
    assert not method_of(compose(["method=full"])).adds("a.lora_A.weight")
