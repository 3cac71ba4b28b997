"""The base's hashes: of every parameter once, shared by the ranks."""

from __future__ import annotations

import torch

from checkpointing import External, external_of
from tests.worlds import WORLD
from trainer.compose import compose
from trainer.methods import build
from trainer.methods.externals import externals_of, is_added

CONFIG = ["method=random_sparse", "model.num_layers=1"]


def declared(rank: int = 0, size: int = 1) -> list[External]:
    import torch.distributed as dist

    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    config = compose(CONFIG)
    return externals_of(build(config), config, rank, size)


def test_every_parameter_of_the_base_by_its_content() -> None:
    config = compose(CONFIG)
    model = build(config)
    found = {one.name: one for one in declared()}
    base = {n: p for n, p in model.named_parameters() if not is_added(n)}
    assert found.keys() == {f"model/{name}" for name in base}
    assert found["model/lm_head.weight"] == external_of("model/lm_head.weight", base["lm_head.weight"], "seed 0")
    with torch.no_grad():
        base["lm_head.weight"][0, 0] += 1
    assert {one.name: one for one in externals_of(model, config, 0, 1)} != found


def test_ranks_hash_a_share_each_and_know_all() -> None:
    assert WORLD.run(declared, 3) == [declared()] * 3


def test_what_methods_add_is_told_by_name() -> None:
    assert is_added("model.layers.0.mlp.up_proj.sparse_values") and is_added("a.lora_A.weight")
    assert not is_added("model.layers.0.mlp.up_proj.weight")
