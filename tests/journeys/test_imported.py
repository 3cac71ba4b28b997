"""A run begun with another library goes on here: the same losses under any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from transformers import AutoModelForCausalLM

from checkpointing import save
from checkpointing.__main__ import main as checkpointing
from checkpointing.foreign import IMPORTED, describe_foreign
from tests.harness.models import save_tiny_model
from tests.harness.runs import rows, train
from tests.harness.worlds import SharedWorld
from tests.journeys.test_own_model import own_data
from tests.trainer.parallel.zoo import save_model
from trainer.compose import compose
from trainer.data.feed import Feed
from trainer.data.sources import load_corpus
from trainer.models import load_tokenizer
from trainer.parallel.deepspeed_engine import initialize, make_ready
from trainer.parallel.world import World

DONE, LAST, LR = 3, 6, 3e-3
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("own")
    save_tiny_model(directory / "model")
    return [
        "model=hf",
        f"model.path={directory / 'model'}",
        *own_data(directory),
        f"train.steps={LAST}",
        "train.global_batch=12",
        "train.micro_batch=3",
        "train.seq_len=24",
        "schedule=constant",
        "schedule.warmup_steps=0",
        f"optimizer.lr={LR}",
        "optimizer.clip=0",
        "eval.generate_tokens=0",
        "eval.every=0",
        "eval.samples=4",
        "tracking=none",
    ]


@pytest.fixture(scope="module")
def batches(common: list[str]) -> Batches:
    """What the trainer's steps 1 to LAST see, for a loop that knows nothing of the trainer."""
    config = compose(common)
    tokenizer = load_tokenizer(config.model)
    corpus = load_corpus(config.data, tokenizer, config.train.seq_len)
    size, seed = config.train.global_batch, config.train.seed
    feed = Feed(corpus.train, global_batch=size, micro_batch=size, seed=seed, pad=tokenizer.eos, num_ranks=1, rank=0)
    return [(batch.inputs, batch.labels) for step in range(1, LAST + 1) for _, batch in feed.step(step).micro_batches]


def original(directory: str, kind: str, model_path: str, batches: Batches) -> list[float]:
    """A plain loop of another library: DONE steps, its own save, and on to the end; the losses after the save."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    step = {"dcp": _of_fsdp, "hf": _of_transformers}.get(kind, _of_deepspeed)(model, directory, kind)
    next(step)
    losses = []
    for number, (inputs, labels) in enumerate(batches, start=1):
        own, targets = inputs.chunk(size)[rank], labels.chunk(size)[rank]
        total = torch.tensor(float((labels != -100).sum()))
        loss = step.send((own, targets, size / total, number))
        dist.all_reduce(loss)
        losses.append(loss.item() / size)
    return losses[DONE:]


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1}
    others = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, others], lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)


def loss_of(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def _plain(model: Any, optimizer: torch.optim.Optimizer, saved: Callable[[], torch.optim.Optimizer]) -> Any:
    """A plain loop; `saved` saves after DONE steps, and gives the optimizer that goes on."""
    loss = None
    while True:
        inputs, labels, factor, number = yield loss
        loss = loss_of(model, inputs, labels) * factor
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if number == DONE:
            optimizer = saved()


def _of_fsdp(model: Any, directory: str, _: str) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)

    def saved() -> torch.optim.Optimizer:
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=directory)
        return optimizer

    return _plain(model, optimizer, saved)


def _of_transformers(model: Any, directory: str, _: str) -> Any:
    """Which has no moments in its directory, so that its optimizer begins anew."""

    def saved() -> torch.optim.Optimizer:
        if dist.get_rank() == 0:
            model.save_pretrained(directory)
        return optimizer_of(model)

    return _plain(torch.nn.parallel.DistributedDataParallel(model), optimizer_of(model), saved)


def _of_deepspeed(model: Any, directory: str, kind: str) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(kind[4]), "stage3_param_persistence_threshold": 20},
        "bf16": {"enabled": "bf16" in kind},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    torch_linear = functional.linear
    try:
        make_ready(World(dist.get_rank(), dist.get_world_size(), local_rank=dist.get_rank()), torch.device("cpu"))
        engine = initialize(model, optimizer_of(model), config)
    finally:
        functional.linear = torch_linear
    loss = None
    while True:
        inputs, labels, factor, number = yield loss
        loss = loss_of(engine, inputs, labels) * factor
        engine.backward(loss)
        engine.step()
        loss = loss.detach()
        if number == DONE:
            engine.save_checkpoint(directory, tag="there")


# Where it began, and where it goes on.
MOVES = [
    ("zero1", 2, ["parallel=fsdp"]),
    ("zero2", 3, ["parallel=ddp"]),
    ("zero3", 2, ["parallel=tp", "parallel.tp=3"]),
    ("dcp", 3, ["parallel=zero2"]),
    ("hf", 1, ["parallel=fsdp"]),
    ("zero2-bf16", 2, ["parallel=zero2", "precision=bf16"]),
]


@pytest.mark.parametrize(("kind", "size", "layout"), MOVES, ids=[kind for kind, _, _ in MOVES])
def test_the_losses_go_on(
    kind: str, size: int, layout: list[str], common: list[str], batches: Batches, tmp_path: Path, world: SharedWorld
) -> None:
    path = next(o for o in common if o.startswith("model.path=")).partition("=")[2]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    expected = world.run(original, size, str(theirs), kind, path, batches)[0]
    flags = ["--trust-pickle"] if kind != "hf" else ["--step", str(DONE)]
    assert checkpointing(["import", str(theirs), str(ours), *flags]) == 0
    here = 3 if kind != "zero2-bf16" else 2
    said = world.run(train, here, [*common, *layout, f"resume={ours}", f"run.dir={tmp_path / 'run'}"], environment=True)
    assert f"step {DONE} of {LAST} is done, imported from" in said[0]
    assert ("the optimizer's state begins at zero" in said[0]) == (kind == "hf")
    found = {row["step"]: row["loss"] for row in rows(tmp_path / "run")}
    assert list(found) == list(range(DONE + 1, LAST + 1))
    # DeepSpeed's bf16 rounds every activation; the trainer's keeps norms and the residual stream in fp32. The state is
    # bit for bit the same (tests/checkpointing/foreign), and what it computes differs by the rounding.
    assert list(found.values()) == pytest.approx(expected, abs=2e-3 if "bf16" in kind else 1e-5, rel=0)


def test_without_the_moments_the_losses_are_others(
    common: list[str], batches: Batches, tmp_path: Path, world: SharedWorld
) -> None:
    """The control."""
    path = next(o for o in common if o.startswith("model.path=")).partition("=")[2]
    expected = world.run(original, 2, str(tmp_path / "theirs"), "dcp", path, batches)[0]
    foreign = describe_foreign(tmp_path / "theirs", trust_pickle=True)
    for piece in foreign.pieces:
        if piece.name.endswith(("exp_avg", "exp_avg_sq")):
            piece.tensor.mul_(0.9)
    told = {"kind": foreign.kind, "step": DONE, "optimizer": True}
    save(tmp_path / "ours", DONE, foreign.pieces, {IMPORTED: told})
    train([*common, f"resume={tmp_path / 'ours'}", f"run.dir={tmp_path / 'run'}"])
    found = [row["loss"] for row in rows(tmp_path / "run")]
    assert found[0] == pytest.approx(expected[0], abs=1e-5)  # the parameters are the same
    assert found != pytest.approx(expected, abs=1e-5, rel=0)


def test_what_the_command_says(common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(o for o in common if o.startswith("model.path=")).partition("=")[2]
    assert checkpointing(["import", path, str(tmp_path / "a")]) == 2
    assert "does not say which step is done. Type --step N" in capsys.readouterr().err
    assert checkpointing(["import", path, str(tmp_path / "a"), "--step", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["optimizer"], told["left_out"]) == (0, False, [])
    assert checkpointing(["import", path, str(tmp_path / "a"), "--step", "0"]) == 2
    assert "holds generations already" in capsys.readouterr().err
    assert checkpointing(["import", str(tmp_path), str(tmp_path / "b")]) == 2
    assert "holds no checkpoint that is known here" in capsys.readouterr().err
    dcp.save({"w": torch.zeros(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert checkpointing(["import", str(tmp_path / "dcp"), str(tmp_path / "b")]) == 2
    assert "type --trust-pickle" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_experts_go_in_and_out_under_their_own_names(common: list[str], tmp_path: Path, world: SharedWorld) -> None:
    """A run that begins at imported weights is one whose model has them, and leaves the house as such a directory."""
    save_model(tmp_path / "right", "mixtral")
    save_model(tmp_path / "wrong", "mixtral")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "wrong")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    other.save_pretrained(tmp_path / "wrong")
    assert checkpointing(["import", str(tmp_path / "right"), str(tmp_path / "imported"), "--step", "0"]) == 0
    small = [option for option in common if "model" not in option]

    def losses(name: str, model: str, *more: str) -> list[float]:
        options = [*small, "model=hf", f"model.path={tmp_path / model}", f"run.dir={tmp_path / name}", "train.steps=3"]
        world.run(train, 2, [*options, "parallel=fsdp", *more], environment=True)
        return [row["loss"] for row in rows(tmp_path / name)]

    expected = losses("direct", "right")
    assert losses("resumed", "wrong", f"resume={tmp_path / 'imported'}") == pytest.approx(expected, abs=1e-6)
    assert losses("control", "wrong") != pytest.approx(expected, abs=1e-3)
    assert checkpointing(["export", str(tmp_path / "resumed"), "--to", "hf", str(tmp_path / "out")]) == 0
    assert checkpointing(["export", str(tmp_path / "direct"), "--to", "torch", str(tmp_path / "out.pt")]) == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in torch.load(tmp_path / "out.pt", weights_only=True).items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-5, msg=name)
