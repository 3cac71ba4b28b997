"""DeepSpeed's engine: every ZeRO stage computes what one process of plain torch computes, and goes on with its runs."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpointing import load, save
from tests.harness.engines import contents_differ, feed_for, training_here
from tests.harness.peak import Peak
from tests.harness.processes import wait_for
from tests.harness.runs import SMALL as TINY
from tests.harness.runs import launch, rows, train
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_torch_engine import SMALL, alone_with, dataset, train_steps, whole
from tests.trainer.parallel.zoo import save_model
from trainer.compose import compose
from trainer.loop import optimize

LAYOUTS = [
    (2, ["parallel.engine=deepspeed"]),
    (3, ["parallel=zero1"]),
    (3, ["parallel=zero2"]),
    (3, ["parallel=zero3"]),
    (2, ["parallel=zero1", "parallel.offload=true"]),
    (2, ["parallel=zero2", "parallel.offload=true"]),
    (2, ["parallel=zero3", "parallel.offload=true"]),
]
STAGES = {layout[0][-5:] + ("+offload" if layout[1:] else ""): layout for _, layout in LAYOUTS[1:]}


LORA = ["method=lora", "method.dropout=0.2"]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("size", "layout", "method"),
    [*((size, layout, []) for size, layout in LAYOUTS), *((size, layout, LORA) for size, layout in LAYOUTS[:4])],
)
def test_every_stage_trains_like_one_process(
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
    # The comparison can fail: without clipping the same steps lead elsewhere.
    if not method:
        other = alone_with(*common, "optimizer.clip=0.5")
        assert not np.allclose(other["rows"], alone["rows"], rtol=2e-5)


@pytest.mark.parametrize("layout", [["parallel.engine=deepspeed"], ["parallel=zero2"], ["parallel=zero3"]])
def test_bf16_dropout_checkpointed_activations_and_parts(layout: list[str], world: SharedWorld) -> None:
    """What stage 3 gathers again in the backward is drawn and rounded as before."""
    common = ["model.dropout=0.2", "precision=bf16", "parallel.activation_checkpointing=true", "parallel.local_batch=1"]
    alone = train_steps(common)
    for result in world.run(train_steps, 2, [*common, *layout]):
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=1e-3)
        np.testing.assert_allclose(result["rows"][0], alone["rows"][0], rtol=2e-5)
    assert not np.allclose(train_steps([*common, "precision=fp32"])["rows"][0], alone["rows"][0], rtol=2e-5)


@pytest.mark.parametrize("layout", [["parallel=zero2"], ["parallel=zero3"]])
def test_a_model_with_tied_weights(tmp_path: Path, layout: list[str], world: SharedWorld) -> None:
    save_model(tmp_path, "llama_tied")
    common = ["model=hf", f"model.path={tmp_path}", "train.global_batch=6", "train.micro_batch=2"]
    alone = train_steps(common)
    for result in world.run(train_steps, 2, [*common, *layout]):
        np.testing.assert_allclose(result["rows"], alone["rows"], rtol=2e-5)


@dataclass(frozen=True)
class Leg:
    """Part of a run: where it goes on, which steps it takes, and where it saves before and after them."""

    steps: tuple[int, ...]
    start: Path | None = None
    before: Path | None = None
    after: Path | None = None
    spoil: str = "nothing"  # what is zeroed after the load

    def take(self, overrides: list[str]) -> list[tuple[float, float]]:
        """Losses and norms of the steps."""
        config = compose([*SMALL, "train.seq_len=12", "train.global_batch=10", *overrides])
        engine = training_here(config)
        if self.start:
            load(self.start, engine.pieces())
            for piece in engine.pieces():
                if piece.name.endswith(self.spoil):
                    piece.tensor.zero_()
            engine.publish()
        if self.before:
            save(self.before, 0, engine.pieces())
        feed = feed_for(engine, config, dataset())
        found = [optimize(engine, feed.step(step), 1e-2, key=step) for step in self.steps]
        if self.after:
            save(self.after, self.steps[-1], engine.pieces())
        return found


def held(directory: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, as one process sees it."""
    config = compose([*SMALL, "train.seq_len=12"])
    engine = training_here(config)
    pieces = engine.pieces()
    load(directory, pieces)
    return {piece.name: piece.tensor for piece in pieces}


# Every stage goes to torch and back in the next test, and round the ring of `tests/benchmarks/test_matrix.py`.
@pytest.mark.parametrize("stage", ["zero3", "zero2+offload"])
def test_a_run_goes_on_under_another_layout(tmp_path: Path, stage: str, world: SharedWorld) -> None:
    zero = STAGES[stage]
    reference = Leg((1, 2, 3, 4)).take([])
    ours, theirs = tmp_path / "torch", tmp_path / "zero"
    Leg((1, 2), after=ours).take([])
    np.testing.assert_allclose(world.run(Leg((1, 2), after=theirs).take, 2, zero)[0], reference[:2], rtol=1e-5)
    np.testing.assert_allclose(Leg((3, 4), theirs).take([]), reference[2:], rtol=1e-5)
    others = [(ours, 3, zero), (theirs, 3, ["parallel=fsdp"])]
    others += [(ours, 1, zero), (theirs, 3, ["parallel=zero2"])] if stage == "zero3" else []
    for number, (directory, size, layout) in enumerate(others):
        again = tmp_path / str(number)
        for rows_of_rank in world.run(Leg((3, 4), directory, before=again).take, size, layout):
            np.testing.assert_allclose(rows_of_rank, reference[2:], rtol=1e-5, err_msg=str((size, layout)))
        expected, found = held(directory), held(again)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # The comparison can fail: without moments the second step is another.
    spoiled = world.run(Leg((3, 4), ours, spoil="/exp_avg").take, 2, zero)[0]
    assert not np.allclose(spoiled, reference[2:], rtol=1e-5)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_param_groups_and_what_is_frozen_go_both_ways(tmp_path: Path, stage: str, world: SharedWorld) -> None:
    """Two learning rates, decay on matrices only, a frozen base; moments and steps of each group are what they were."""
    common = ["optimizer.lr_scale=[lora_B:0.25]", "optimizer.weight_decay=0.5", "method=lora"]
    zero = [*STAGES[stage], *common]
    reference = Leg((1, 2, 3, 4)).take(common)
    ours, theirs = tmp_path / "torch", tmp_path / "zero"
    Leg((1, 2), after=ours).take(common)
    world.run(Leg((1, 2), after=theirs).take, 2, zero)
    for source, size, layout in ((ours, 3, zero), (theirs, 3, [*common, "parallel=fsdp"])):
        again = tmp_path / f"from {source.name}"
        for found in world.run(Leg((3, 4), source, before=again).take, size, layout):
            np.testing.assert_allclose(found, reference[2:], rtol=1e-5, err_msg=source.name)
        assert contents_differ(source, again) == []
    # The comparison can fail: with one rate for all the second step is another.
    other = world.run(Leg((3, 4), ours).take, 2, [*zero, "optimizer.lr_scale=[lora_B:1.0]"])[0]
    assert not np.allclose(other, reference[2:], rtol=1e-5)


@pytest.mark.usefixtures("processes")
def test_a_whole_run_changes_its_layout_and_leaves_nothing(tmp_path: Path, world: SharedWorld) -> None:
    before = set(buffers())
    common = [*TINY, "train.global_batch=6", f"run.dir={tmp_path / 'run'}", "checkpoint.every=2", "schedule=constant"]
    done = launch(2, [*common, "parallel=zero2", "train.steps=2"])
    assert done.returncode == 0, done.stderr
    # The plan, and lines of steps: nothing of DeepSpeed's own.
    assert "2 on cpu: DeepSpeed, ZeRO stage 2;" in done.stdout
    assert not any(noise in done.stdout + done.stderr for noise in ("[INFO]", "[WARNING]", "deprecated")), done.stderr
    for size, layout, steps in [(3, "fsdp", 4), (3, "zero3", 6), (1, "zero1", 8), (1, "ddp", 10)]:
        arguments = [*common, f"parallel={layout}", f"train.steps={steps}"]
        world.run(train, size, arguments, environment=True)
    other = [o for o in common if not o.startswith("run.dir")]
    train([*other, f"run.dir={tmp_path / 'other'}", "train.steps=10"])
    found, expected = rows(tmp_path / "run"), rows(tmp_path / "other")
    assert [row["step"] for row in found] == list(range(1, 11))
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
    wait_for(lambda: not set(buffers()) - before, 60)  # those of tests beside this one go as well


def buffers() -> list[str]:
    """What DeepSpeed has in shared memory."""
    return [path.name for path in Path("/dev/shm").glob("deepspeed*")]


def test_an_engine_leaves_torch_as_it_was(world: SharedWorld) -> None:
    assert all(world.run(linear_is_the_same, 2))


def linear_is_the_same() -> bool:
    ours = torch.nn.functional.linear
    Leg((1,)).take(["parallel=zero3"])
    return torch.nn.functional.linear is ours


def left_of(layout: list[str], *, closed: bool) -> float:
    """Of the bytes that an engine held after a step, the share that is there when it is gone."""
    config = compose(["train.global_batch=4", "train.micro_batch=2", *layout])
    with Peak([]) as peak:
        engine = training_here(config)
        optimize(engine, feed_for(engine, config, dataset()).step(1), 1e-3, 1)
        gc.collect()
        held = peak.now
        if closed:
            engine.close()
        del engine
        gc.collect()
        return peak.now / held


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_closed_engine_leaves_its_memory(stage: int, world: SharedWorld) -> None:
    layout = ["parallel.engine=deepspeed", f"parallel.zero_stage={stage}"]

    def left(closed: bool) -> float:
        return max(world.run(partial(left_of, closed=closed), 2, layout))

    assert left(True) < 0.1
    assert stage == 0 or left(False) > 0.5  # the control
