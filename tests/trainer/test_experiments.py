"""The files of conf/experiment: each composes, fits where it says, and trains when everything in it is small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from tests.harness.models import save_tiny_model, tokenizer
from tests.harness.runs import rows, train
from tests.harness.worlds import SharedWorld
from trainer.compose import compose
from trainer.data.templates import CHATML
from trainer.footprint import footprint, plan_memory
from trainer.methods import build_largest
from trainer.options.launch import SlurmLaunch
from trainer.plan import plan_batch, resolve_topology

GPU = 80e9
RESERVED = 4e9  # of the driver, the libraries and the allocator
# The published sizes of the models that they name.
SIZES = {
    "llama_1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "llama_8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama_8b_lora": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama_70b_lora": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
PARAMETERS = {"llama_1b": 1.24e9, "llama_8b": 8.03e9, "llama_8b_lora": 8.03e9, "llama_70b_lora": 70.55e9}
# Processes, and what is divided with their number.
SMALLER = {"llama_8b": (2, []), "llama_70b_lora": (4, ["parallel.dp_shard=2"])}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]
    path.write_text("".join(json.dumps({"messages": turns, "id": n}) + "\n" for n in range(60)))
    return path


@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("name", SIZES)
def test_it_fits_where_it_says(name: str, tmp_path: Path) -> None:
    shape = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, **SIZES[name]}
    LlamaConfig(max_position_embeddings=131072, **shape).save_pretrained(tmp_path)
    config = compose([f"experiment={name}", f"model.path={tmp_path}", "data.path=x"])
    launch = config.launch
    nodes = int(launch.nodes) if isinstance(launch, SlurmLaunch) else 1
    model = build_largest(config)
    base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    assert abs(base / PARAMETERS[name] - 1) < 0.01
    topology = resolve_topology(config.parallel, nodes * launch.nproc)
    batch = plan_batch(config, topology.data_size)
    sizes = footprint(config, model)
    memory = plan_memory(config, sizes, topology, batch.rounds)
    assert sizes.known and 0.1 * GPU < memory.total < GPU - RESERVED, memory


@pytest.mark.smoke
@pytest.mark.parametrize("name", SIZES)
def test_it_trains_when_everything_is_small(name: str, chats: Path, tmp_path: Path, world: SharedWorld) -> None:
    save_tiny_model(tmp_path / "model")
    made = tokenizer()
    made.chat_template = CHATML
    made.save_pretrained(tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").max_position_embeddings == 64
    small = ["train.seq_len=64", "train.global_batch=4", "train.micro_batch=2", "train.epochs=null", "train.steps=2"]
    small += [
        f"data.cache={tmp_path}/tokens",
        "tracking=none",
        "precision=fp32",
        "eval.every=1",
        "eval.generate_tokens=2",
    ]
    small += ["checkpoint.memory.every=0", f"model.path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}"]
    processes, smaller = SMALLER.get(name, (1, []))
    world.run(train, processes, [f"experiment={name}", f"data.path={chats}", *small, *smaller], environment=True)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert all("eval_loss" in row for row in rows(tmp_path / "run"))
