"""8-bit moments: those of torchao bit for bit, the same under every layout, and kept by checkpoints as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.optim import AdamW8bit
from torchao.optim.quant_utils import create_dynamic_map

from checkpointing import Piece, describe, load, save
from tests.harness.engines import feed_for, training_here
from tests.harness.runs import rows
from tests.harness.runs import train as run_trainer
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.test_torch_engine import dataset
from tests.trainer.parallel.zoo import save_model
from trainer.compose import compose
from trainer.errors import Refused
from trainer.footprint import footprint, plan_memory
from trainer.job import read
from trainer.loop import optimize
from trainer.methods import build
from trainer.methods.method import Method
from trainer.optimizers.adamw_8bit import EightBitAdamW, check_blocks, cut_within, is_in_blocks
from trainer.optimizers.groups import param_groups
from trainer.options import optimizer as optimizer_options
from trainer.options.config import Config
from trainer.options.optimizer import Optimizer
from trainer.parallel.computing import set_lr
from trainer.parallel.deepspeed_options import check_deepspeed
from trainer.parallel.tensor import shares_of
from trainer.parallel.world import World, pick_device
from trainer.plan import resolve_topology

# Rows of 512, so that two tensor-parallel ranks hold a whole block of each.
MODEL = ["model.hidden_size=512", "model.intermediate_size=512", "model.num_layers=2", "model.vocab_size=256"]
COMMON = [*MODEL, "train.seq_len=12", "train.global_batch=8", "train.micro_batch=2", "optimizer=adamw_8bit"]
MAPS = {"exp_avg": np.array(create_dynamic_map(signed=True)), "exp_avg_sq": np.array(create_dynamic_map(signed=False))}


def eager() -> Any:
    """torchao's step as it is written: compiled it is the same arithmetic, after seconds for every shape."""
    return torch.compiler.set_stance("force_eager")


def train(overrides: list[str], steps: list[int], start: str = "", end: str = "") -> dict[str, Any]:
    """On this process's world, from one generation to another: losses, and all that it holds."""
    with eager():
        config = compose([*COMMON, *overrides])
        engine = training_here(config)
        if start:
            load(start, engine.pieces())
        feed = feed_for(engine, config, dataset())
        before = parts(engine.pieces())
        rows = [optimize(engine, feed.step(step), 1e-3, key=step) for step in steps]
        if end:
            save(end, steps[-1], engine.pieces())
        return {"rows": rows, "before": before, "after": parts(engine.pieces())}


def parts(pieces: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]:
    return [(p.name, p.offset, p.global_shape, p.tensor.detach().clone().numpy()) for p in pieces if type(p) is Piece]


def whole(results: list[dict[str, Any]], when: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for result in results:
        for name, offset, shape, part in result[when]:
            target = found.setdefault(name, np.zeros(shape, part.dtype))
            target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return found


def moments(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As numbers."""
    found = {}
    for name, codes in held.items():
        if name.endswith("_codes"):
            plain, key = name.removesuffix("_codes"), name.rpartition("/")[2].removesuffix("_codes")
            scales = np.repeat(held[f"{plain}_scales"], codes.shape[-1] // held[f"{plain}_scales"].shape[-1], axis=-1)
            found[plain] = MAPS[key][codes] * scales
        elif name.startswith("optim/") and not name.endswith("_scales"):
            found[name] = codes
    return found


LAYOUTS = [
    (3, ["parallel=fsdp"]),
    (4, ["parallel.tp=2", "parallel.dp_shard=2"]),
    (2, ["parallel=pp"]),
]


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys() and len(found) > 50
    numbers = moments(found)
    for name, value in moments(expected).items():
        # Of the largest moment of a tensor: rounding in another order moves a value to the next code.
        np.testing.assert_allclose(numbers[name], value, atol=0.03 * np.abs(value).max(), err_msg=name)
    for name in (name for name in expected if name.startswith("model/")):
        np.testing.assert_allclose(found[name], expected[name], atol=2e-4, err_msg=name)  # a fifth of a step


def test_every_layout_has_the_moments_of_one_process_and_loads_those_of_another(
    tmp_path: Path, world: SharedWorld
) -> None:
    alone = train([], [1, 2], end=str(tmp_path / "alone"))
    on = train([], [3], start=str(tmp_path / "alone"))
    expected, last = whole([alone], "after"), whole([on], "after")
    saved = tmp_path / "alone"
    for number, (size, layout) in enumerate(LAYOUTS):
        there = tmp_path / str(number)
        begun = world.run(train, size, layout, [1, 2])
        assert_close(whole(begun, "after"), expected)
        # What the layout before saved is here bit for bit: codes and scales, not numbers that were quantised again.
        results = world.run(train, size, layout, [3], str(saved), str(there))
        held, stored = whole(results, "before"), whole([train([], [], start=str(saved))], "before")
        assert held.keys() == stored.keys() and all(np.array_equal(held[name], stored[name]) for name in stored)
        if saved == tmp_path / "alone":
            assert_close(whole(results, "after"), last)
            assert results[0]["rows"] == [pytest.approx(row, rel=1e-4) for row in on["rows"]]
        saved = there
    # The comparison sees scales that are in the wrong place.
    wrong = {k: np.roll(v, 1, axis=0) if k.endswith("_scales") else v for k, v in expected.items()}
    with pytest.raises(AssertionError):
        assert_close(wrong, expected)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 16), nn.LayerNorm(16), nn.Linear(16, 256))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, set_rate: Any, steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_rate(1e-3 * (step + 1))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    scales = {n: 1.0 for n, _ in model.named_parameters()}
    return param_groups(model, Optimizer(lr=1e-3, weight_decay=0.1), scales, Method(Config()).decays)


def ours(model: nn.Module) -> EightBitAdamW:
    blocked = {p for p in model.parameters() if p.requires_grad and is_in_blocks(p.shape)}
    return EightBitAdamW(groups_of(model), blocked, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.usefixtures("processes")
def test_it_is_torchaos_arithmetic_compiled_or_not() -> None:
    """In blocks bit for bit; other parameters have AdamW of torch."""
    torch.compiler.reset()
    model, low, full, compiled = small(), small(), small(), small()
    with eager():
        optimizer = ours(model)
        found = stepped(model, optimizer, lambda lr: set_lr(optimizer.param_groups, lr))
        theirs = AdamW8bit(groups_of(low), lr=1e-3, betas=(0.9, 0.95))
        in_blocks = stepped(low, theirs, lambda lr: [group["lr"].fill_(lr) for group in theirs.param_groups])
    plain = torch.optim.AdamW(groups_of(full), lr=1e-3, betas=(0.9, 0.95), fused=True)
    others = stepped(full, plain, lambda lr: set_lr(plain.param_groups, lr))
    assert torch.equal(found[0], in_blocks[0]) and not torch.equal(found[0], others[0])
    assert all(map(torch.equal, found[1:], others[1:]))  # the other matrix has rows of 16, which is no block
    other = ours(compiled)
    for a, b in zip(found, stepped(compiled, other, lambda lr: set_lr(other.param_groups, lr)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    kept = {p.name: p.tensor for p in describe(model, optimizer)}
    assert kept["optim/0.weight/exp_avg_codes"].dtype == torch.uint8 and kept["optim/0.weight/step"] == 3
    assert kept["optim/0.weight/exp_avg_scales"].shape == (16, 1) and kept["optim/2.weight/exp_avg"].shape == (256, 16)
    state = {p.name: p.tensor.clone() for p in describe(compiled, other)}
    assert state["optim/0.weight/exp_avg_codes"].count_nonzero() and state["optim/0.weight/exp_avg_scales"].all()


@pytest.mark.usefixtures("long")
def test_it_learns_as_adamw_does_and_not_without_its_moments() -> None:
    inputs, wanted = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(2))

    def fitted(make: Any, forget: bool = False) -> list[float]:
        model = small()
        optimizer, losses = make(model), []
        with eager():
            for _ in range(40):
                losses.append(loss := (model(inputs) - wanted).square().mean())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if forget:
                    optimizer.state[model[0].weight]["exp_avg_sq_scales"].zero_()
        return [loss.item() for loss in losses]

    full = fitted(lambda model: torch.optim.AdamW(groups_of(model), lr=1e-3, betas=(0.9, 0.95)))
    assert full[-1] < 0.9 * full[0]
    np.testing.assert_allclose(fitted(ours), full, rtol=2e-3)
    assert not np.allclose(fitted(ours, forget=True), full, rtol=2e-3)


def rows_of_two(steps: int) -> list[tuple[str, Any]]:
    """A matrix of fewer rows than ranks, sharded where there are several: what each rank holds after a few steps."""
    torch.manual_seed(3)
    model = nn.Linear(4096, 2, bias=False)
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = ours(model)
    inputs = torch.randn(8, 4096, generator=torch.Generator().manual_seed(4))
    with eager():
        for _ in range(steps):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [(p.name, p.offset, p.tensor.detach().numpy().copy()) for p in describe(model, optimizer)]


def test_ranks_without_rows_go_along(world: SharedWorld) -> None:
    alone = {name: value for name, _, value in rows_of_two(3)}
    results = world.run(rows_of_two, 3, 3)
    assert [len(held) for held in results] == [6, 6, 1]  # the third has nothing but the count of steps
    assert not np.allclose(alone["model/weight"], rows_of_two(2)[0][2], atol=1e-7)
    for held in results:
        for name, offset, value in held:
            whole = alone[name]
            start = offset[0] if offset else 0
            expected = whole[start : start + len(value)] if value.ndim else whole
            if value.dtype == np.uint8:
                np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1, err_msg=name)
                continue
            # Three equal gradients do not average to themselves to the last bit, so that on some processors a moment is
            # rounded to the code beside it, which moves its weight. That may happen to one in a thousand.
            beside = ~np.isclose(value, expected, rtol=1e-4, atol=1e-7)
            assert beside.mean() <= 1e-3, (name, int(beside.sum()))
            np.testing.assert_allclose(value[beside], expected[beside], rtol=0, atol=5e-6, err_msg=name)
    assert all(value == 3 for held in results for name, _, value in held if name.endswith("/step"))


def resumed(directory: str, overrides: list[str], last: int) -> list[float]:
    with eager():
        run_trainer([*RUN, f"run.dir={directory}", f"train.steps={last}", *overrides])
    return [row["loss"] for row in rows(Path(directory))]


RUN = [*MODEL, "optimizer=adamw_8bit", "train.seq_len=16", "train.global_batch=6", "train.micro_batch=2", "data=stdlib"]
RUN += ["eval.every=0", "eval.samples=4", "eval.generate_tokens=0", "tracking=none", "checkpoint.every=3"]
RUN += ["schedule=constant", "schedule.warmup_steps=0", "optimizer.lr=3e-3"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_goes_on_under_another_layout(method: str, tmp_path: Path, world: SharedWorld) -> None:
    own = [f"method={method}", "optimizer.lr=3e-3"]
    whole_run = resumed(str(tmp_path / "whole"), own, 6)
    world.run(resumed, 4, str(tmp_path / "parts"), [*own, "parallel.dp_shard=2"], 3, environment=True)
    again = world.run(resumed, 2, str(tmp_path / "parts"), [*own, "parallel=ddp"], 6, environment=True)[0]
    assert again == pytest.approx(whole_run, rel=2e-3) and len(again) == 6
    assert resumed(str(tmp_path / "fused"), [*own, "optimizer.implementation=foreach"], 6) != whole_run
    with pytest.raises(
        Refused, match=r"whose moments cannot be loaded for fused\. Type optimizer\.implementation=torchao_8bit"
    ):
        resumed(str(tmp_path / "parts"), [*own, "optimizer.implementation=fused"], 7)


@pytest.mark.usefixtures("long")
def test_torchs_two_kernels_are_free_to_change(tmp_path: Path) -> None:
    own = ["optimizer=adamw", "method=full"]
    whole_run = resumed(str(tmp_path / "whole"), own, 6)
    resumed(str(tmp_path / "parts"), own, 3)
    assert resumed(str(tmp_path / "parts"), [*own, "optimizer.implementation=foreach"], 6) == pytest.approx(
        whole_run, rel=1e-5
    )


def test_deepspeed_and_sparse_methods_keep_fp32_moments() -> None:
    config = compose(["parallel=zero1", "optimizer=adamw_8bit"])
    with pytest.raises(
        Refused, match=r"DeepSpeed cuts parameters anywhere\. Type optimizer\.implementation=fused, or parallel=fsdp"
    ):
        check_deepspeed(config, resolve_topology(config.parallel, 2))
    for method, kind in (("lift", "foreach"), ("lt_sft", "torchao_8bit")):
        with pytest.raises(Refused, match=f"method={method} trains single entries"):
            compose([f"method={method}", f"optimizer.implementation={kind}"])
    compose(["method=lt_sft", "optimizer.implementation=foreach"])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_options, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"torchao's, which is not installed\. Type `pip install torchao`, or"):
        compose(["optimizer=adamw_8bit"])


def test_the_plan_counts_a_quarter_of_the_optimizers_state() -> None:
    def planned(*overrides: str) -> int:
        config = compose([*MODEL, *overrides])
        topology = resolve_topology(config.parallel, 1)
        return plan_memory(config, footprint(config, build(config, "meta")), topology, 1).optimizer

    model = build(compose(MODEL))
    held = describe(model, ours(model))
    taken = sum(p.tensor.nbytes for p in held if p.name.startswith("optim/") and p.tensor.dim())
    assert planned("optimizer=adamw_8bit") == taken < 0.26 * planned()


# A layout that would cut blocks is refused on every process alike, with one that does not.
WIDE = ["model.hidden_size=512", "model.num_heads=4", "model.num_kv_heads=4", "model.num_layers=2"]


def meta(*overrides: str) -> object:
    return build(compose([*WIDE, *overrides]), "meta")


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
    common = [*WIDE, "model.intermediate_size=768", "parallel.tp=2", f"run.dir={tmp_path}"]
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
