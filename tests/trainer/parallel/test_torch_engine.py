"""The torch engine: every layout computes what one process computes."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from checkpointing import Piece
from checkpointing.collective import Team
from tests.conftest import ALLOWED_SKIP
from tests.harness.engines import feed_for, training_here, windows
from tests.harness.processes import ROOT
from tests.harness.runs import environment
from tests.harness.worlds import SharedWorld
from trainer.compose import compose
from trainer.data.dataset import Windows
from trainer.evaluation import evaluate
from trainer.loop import optimize
from trainer.methods import build
from trainer.models import blocks

SMALL = ["model.hidden_size=32", "model.intermediate_size=53", "model.num_layers=2", "train.seq_len=12"]


def dataset() -> Windows:
    return windows(12)


def train_steps(overrides: list[str], num_steps: int = 4) -> dict:
    """Losses, norms, the evaluation and the parameters after a few steps, on this process's world."""
    small = [] if "model=hf" in overrides else SMALL
    config = compose(["train.seq_len=12", *small, *overrides])
    engine = training_here(config)
    feed = feed_for(engine, config, dataset())
    rows = [optimize(engine, feed.step(s), 1e-2, key=s) for s in range(1, num_steps + 1)]
    held_out = evaluate(engine, feed.evenly(dataset(), 7))
    parts = [
        (p.name, p.offset, p.global_shape, p.tensor.detach().clone().numpy())
        for p in engine.pieces()
        if isinstance(p, Piece) and p.name.startswith("model/")
    ]
    return {"rows": rows, "eval": held_out, "parts": parts}


@functools.cache
def alone_with(*overrides: str) -> dict:
    """The same on one process, for every layout that is compared with it."""
    return train_steps(list(overrides))


def whole(results: list[dict]) -> dict[str, np.ndarray]:
    model: dict[str, np.ndarray] = {}
    for result in results:
        for name, offset, shape, part in result["parts"]:
            target = model.setdefault(name, np.full(shape, np.nan, np.float32))
            target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return model


LAYOUTS = [
    (2, ["parallel=ddp"]),
    (3, ["parallel=ddp"]),
    (2, ["parallel=fsdp"]),
    (3, ["parallel=fsdp"]),
    (4, ["parallel.dp_shard=2"]),
]


@pytest.mark.smoke
@pytest.mark.parametrize("method", [[], ["method=lora", "method.dropout=0.2"], ["model.dropout=0.2"]])
@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_every_layout_trains_like_one_process(
    size: int, layout: list[str], method: list[str], world: SharedWorld
) -> None:
    common = ["train.global_batch=10", "train.micro_batch=2", *method]  # five micro-batches: no size here divides them
    alone = alone_with(*common)
    results = world.run(train_steps, size, [*common, *layout])
    for result in results:
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=2e-5)
        assert result["eval"] == pytest.approx(alone["eval"], rel=1e-5)
    model = whole(results)
    for name, offset, _, part in alone["parts"]:
        assert offset == (0,) * part.ndim
        np.testing.assert_allclose(model[name], part, atol=3e-4, err_msg=name)
    # The comparison can fail: another key, as for a dropout drawn by rank or a shifted cursor, gives other numbers.
    if method:
        other = alone_with(*common, "parallel.local_batch=1")
        assert not np.allclose(other["rows"], alone["rows"], rtol=2e-5)


def test_bf16_computes_alike_in_every_layout(world: SharedWorld) -> None:
    common = ["precision=bf16", "train.global_batch=10", "train.micro_batch=2"]
    alone = train_steps(common)
    assert alone["rows"] != train_steps(["train.global_batch=10", "train.micro_batch=2"])["rows"]
    for size, layout in ((2, ["parallel=ddp"]), (3, ["parallel=fsdp"])):
        for result in world.run(train_steps, size, [*common, *layout]):
            np.testing.assert_allclose(result["rows"][0], alone["rows"][0], rtol=1e-4)  # then rounding drifts apart
            np.testing.assert_allclose(*([loss for loss, _ in rows["rows"]] for rows in (result, alone)), rtol=1e-3)
    assert all(part.dtype == np.float32 for *_, part in alone["parts"])  # masters


def test_local_batches_change_memory_and_not_the_result() -> None:
    common = ["train.global_batch=8", "train.micro_batch=4"]
    whole_batch, split = train_steps(common), train_steps([*common, "parallel.local_batch=3"])
    np.testing.assert_allclose(split["rows"], whole_batch["rows"], rtol=2e-5)


def test_the_loss_is_the_mean_over_the_targets_of_the_global_batch() -> None:
    config = compose([*SMALL, "train.global_batch=6", "train.micro_batch=2"])
    engine = training_here(config)
    feed = feed_for(engine, config, dataset())
    share = feed.step(1)
    inputs = torch.cat([b.inputs for _, b in share.micro_batches])
    labels = torch.cat([b.labels for _, b in share.micro_batches])
    model = build(config)
    loss = cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = optimize(engine, share, 0.0, key=0)
    assert found == pytest.approx((loss.item(), norm.item()), rel=1e-5)


def test_clipping_bounds_the_gradient_and_zero_turns_it_off() -> None:
    def first_moment(clip: float) -> float:
        config = compose([*SMALL, f"optimizer.clip={clip}", "optimizer.betas=[0.0,0.9]"])
        engine = training_here(config)
        feed = feed_for(engine, config, dataset())
        optimize(engine, feed.step(1), 1e-3, key=0)
        moments = [p.tensor for p in engine.pieces() if p.name.endswith("/exp_avg")]
        return float(torch.nn.utils.get_total_norm(moments))

    free = first_moment(0.0)
    assert free > 0.5
    assert first_moment(0.25) == pytest.approx(0.25, rel=1e-4)
    assert first_moment(100.0) == pytest.approx(free, rel=1e-5)


def test_blocks_are_the_repeated_layers() -> None:
    assert len(blocks(build(compose(SMALL)))) == 2
    assert len(blocks(build(compose([*SMALL, "method=lora"])))) == 2


def describe_after_evaluation() -> bool:
    """FSDP2 leaves the root gathered after an evaluation; the pieces must be shards all the same."""
    config = compose([*SMALL, "parallel=fsdp"])
    engine = training_here(config)
    feed = feed_for(engine, config, dataset())
    evaluate(engine, feed.evenly(dataset(), 4))
    held = {p.name: p.tensor.numel() for p in engine.pieces() if isinstance(p, Piece)}
    total = Team().together(lambda: held["model/lm_head.weight"])
    return sum(total) == 256 * 32


def test_pieces_after_an_evaluation_are_shards(world: SharedWorld) -> None:
    assert all(world.run(describe_after_evaluation, 3))


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason=ALLOWED_SKIP)
def test_a_gpu_computes_what_the_cpu_computes() -> None:
    script = f"from {__name__} import compare_gpu_and_cpu; compare_gpu_and_cpu()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(EVERSHARD_TEST_GPU="0"), check=True)


def compare_gpu_and_cpu() -> None:
    config = compose([*SMALL, "train.global_batch=8"])
    rows = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        engine = training_here(config, device=device)
        feed = feed_for(engine, config, dataset())
        rows.append([optimize(engine, feed.step(s), 1e-2, key=s) for s in range(1, 4)])
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-3)
