"""`parallel=auto`: what it takes for known models and machines, and why."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.harness.runs import SMALL, train
from tests.harness.worlds import SharedWorld
from trainer.compose import compose
from trainer.errors import Refused
from trainer.footprint import Footprint, footprint, plan_memory
from trainer.methods import build, method_of
from trainer.options.config import Config
from trainer.parallel.auto import USABLE, Cluster, choose, layouts, memory_of
from trainer.parallel.tensor import is_splittable
from trainer.plan import plan_batch, resolve_topology

# Llama's shapes: hidden, inner, layers, heads, key-value heads, whether the embedding is tied.
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8, True),
    "8B": (4096, 14336, 32, 32, 8, False),
    "70B": (8192, 28672, 80, 64, 8, False),
}


@lru_cache
def model_of(name: str, method: str) -> tuple[Config, Footprint]:
    hidden, inner, layers, heads, kv, tied = SHAPES[name]
    options = {"full": [], "lora": ["method=lora", "method.target_modules=[q_proj,v_proj]"]}[method]
    sizes = ["train.seq_len=2048", "train.global_batch=64", "train.micro_batch=1", "precision=bf16"]
    config = compose([*options, *sizes])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv,
                tie_word_embeddings=tied,
            ),
            dtype=torch.float32,
        )
        model = method_of(config).attach(model)
    return config, footprint(config, model)


CASES = [
    # model, method, GB a process, processes, on a machine; what is taken (degrees other than 1), or None
    ("1B", "full", 80, 1, 1, {}),
    ("1B", "full", 80, 8, 8, {"dp_replicate": 8}),
    ("1B", "full", 24, 8, 8, {"dp_shard": 2, "dp_replicate": 4}),
    ("1B", "full", 16, 1, 1, None),
    ("8B", "full", 80, 8, 8, {"dp_shard": 4, "dp_replicate": 2}),
    ("8B", "full", 80, 16, 8, {"dp_shard": 4, "dp_replicate": 4}),
    ("8B", "full", 80, 1, 1, None),
    ("8B", "lora", 80, 1, 1, {}),
    ("8B", "full", 24, 8, 8, {"tp": 8}),
    ("70B", "full", 141, 16, 8, {"dp_shard": 16}),
    ("70B", "full", 80, 64, 8, {"dp_shard": 64}),
    ("70B", "full", 80, 16, 8, None),
    ("70B", "lora", 80, 8, 8, {"dp_shard": 8}),
    ("70B", "full", 80, 8, 8, None),
]


@pytest.mark.parametrize(("name", "method", "memory", "size", "local", "expected"), CASES)
def test_known_models_on_known_machines(
    name: str, method: str, memory: int, size: int, local: int, expected: dict[str, int] | None
) -> None:
    config, of = model_of(name, method)
    cluster = Cluster(size, local, memory * 10**9)
    if expected is None:
        with pytest.raises(Refused, match=r"parallel=auto finds no layout .* Start \d+ processes, or type method=lora"):
            choose(config, of, cluster, lambda t: t.tp <= 8 and t.pp <= len(of.layers))
        return
    chosen, lines = choose(config, of, cluster, lambda t: t.tp <= 8 and t.pp <= len(of.layers))
    topology = resolve_topology(chosen.parallel, size)
    assert {key: degree for key, degree in asdict(topology).items() if degree > 1} == expected
    need = plan_memory(chosen, of, topology, plan_batch(chosen, topology.data_size).rounds).total
    assert need <= USABLE * memory * 10**9
    assert "takes the first layout that fits" in lines[0]
    assert (len(lines) == 2) == (not expected.keys() <= {"dp_replicate"})  # what did not fit is said


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 12))
def test_every_layout_that_is_tried_fills_the_world(size: int, local: int, num_layers: int) -> None:
    tried = list(layouts(Cluster(size, local, 0), lambda t: t.tp <= 4 and t.pp <= num_layers))
    assert all(topology.size == size and topology.tp <= min(4, local) for topology, _ in tried)
    assert all(topology.pp <= num_layers for topology, _ in tried)
    assert len(set(tried)) == len(tried) and tried[0][0].dp_replicate == size


def test_what_cannot_be_told_beforehand_is_not_taken_for_nothing() -> None:
    config = compose(SMALL)
    model = build(config, "meta")
    model.model.layers[0].forward = lambda *_, **__: 1 / 0
    of = footprint(config, model)
    assert not of.known
    with pytest.raises(Refused, match=r"cannot be told beforehand\. Type the layout instead"):
        choose(config, of, Cluster(8, 8, 10**12), lambda _: True)


def test_what_cannot_be_split_is_not_tried() -> None:
    assert all(topology.tp == 1 for topology, _ in layouts(Cluster(8, 8, 0), lambda t: t.tp == 1))
    model = build(compose(["model.num_heads=4", "model.num_kv_heads=2"]), "meta")
    assert [is_splittable(model, size) for size in (1, 2, 4, 5)] == [True, True, True, False]


def test_a_layout_that_the_optimizer_refuses_is_not_taken() -> None:
    config, of = model_of("1B", "full")
    cluster = Cluster(8, 8, 80 * 10**9)
    chosen, _ = choose(config, of, cluster, lambda _: False, lambda topology: topology.dp_shard == 4)
    assert (chosen.parallel.dp_replicate, chosen.parallel.dp_shard) == (2, 4)
    with pytest.raises(Refused, match=r"no layout of 8 .* that this optimizer accepts\. Type optimizer=adamw"):
        choose(config, of, cluster, lambda _: False, lambda _: False)


def test_memory_is_shared_by_the_processes_of_a_machine() -> None:
    whole = memory_of(torch.device("cpu"), 1)
    assert whole > 2**28 and memory_of(torch.device("cpu"), 4) == whole // 4


def test_a_run_says_what_it_took(tmp_path: Path, world: SharedWorld) -> None:
    overrides = [*SMALL, "parallel=auto", "train.steps=1", f"run.dir={tmp_path}"]
    outputs = world.run(train, 2, overrides, environment=True)
    assert "layout     parallel=auto takes the first layout that fits" in outputs[0]
    assert "DDP, dp_replicate 2 x dp_shard 1" in outputs[0]
