"""ZeRO's flat partitions as pieces: what DeepSpeed itself would gather, on any stage and any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpointing import LayoutError, describe, load, save
from checkpointing.layouts.zero import describe_zero, publish_zero
from tests.checkpointing.zero_engines import (
    ENGINES,
    LOW,
    ROWS,
    Kind,
    Model,
    assert_same,
    optimizer_of,
    start,
    tokens_of,
    train_alone,
    train_engine,
    whole,
)
from tests.harness.worlds import SharedWorld


def forward(engine: Any) -> torch.Tensor:
    engine.module.eval()
    with torch.no_grad():
        logits = engine.module(tokens_of(99)).clone()
    engine.module.train()
    return logits


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    """What DeepSpeed's own functions give."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() in (
        1,
        2,
    ):  # its links leave out the second param group until they are made anew
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            found[f"model/{name}"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"optim/{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
        else:
            with zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
                found[f"model/{name}"] = parameter.detach().clone()
    return found


def compare_with_deepspeed(kinds: Sequence[Kind]) -> None:
    for kind in kinds:
        engine = start(kind)
        train_engine(engine, [1, 2])
        described = whole(describe_zero(engine))
        steps = {name: tensor for name, tensor in described.items() if name.endswith("/step")}
        assert steps and all(tensor == 2 for tensor in steps.values())
        assert described.pop("buffer/seen") == 2 * 5 * ROWS // dist.get_world_size()
        assert_same({n: t for n, t in described.items() if n not in steps}, gathered(engine))


@pytest.mark.parametrize("size", [2, 3])
def test_pieces_are_what_deepspeed_gathers(size: int, world: SharedWorld) -> None:
    world.run(compare_with_deepspeed, size, [*ENGINES[1:], *LOW[1:]])


def describe_before_the_first_step(kinds: Sequence[Kind]) -> None:
    model = Model()
    expected = whole(describe(model, optimizer_of(model)))
    for kind in kinds:
        engine = start(kind)
        found = whole(describe_zero(engine))
        rounded = {n: t.bfloat16().to(found[n].dtype) if kind[2] == 16 and n.startswith("model/") else t
                   for n, t in expected.items()}  # fmt: skip
        assert_same(found, rounded)
        masters = {p.tensor.dtype for p in describe_zero(engine) if p.name.startswith("model/inner")}
        assert masters <= {torch.float32}
        # What was described before is what trains then.
        train_engine(engine, [1])
        again = whole(describe_zero(engine))
        assert not torch.equal(again["model/inner.weight"], found["model/inner.weight"])


def test_a_fresh_engine_has_all_state(world: SharedWorld) -> None:
    world.run(describe_before_the_first_step, 2, [*ENGINES, *LOW])


def save_and_go_on(directory: str, kind: Kind) -> dict[str, torch.Tensor]:
    """Two steps, a save, and two more; what was saved and, as `later`, what came of it."""
    engine = start(kind)
    train_engine(engine, [1, 2])
    save(directory, 2, describe_zero(engine))
    saved = whole(describe_zero(engine))
    train_engine(engine, [3, 4])
    return saved | {f"later/{name}": tensor for name, tensor in whole(describe_zero(engine)).items()}


def load_and_go_on(directory: str, kinds: Sequence[Kind], expected: dict[str, torch.Tensor], publish: bool) -> None:
    saved = {name: tensor for name, tensor in expected.items() if not name.startswith("later/")}
    for kind in kinds:
        engine = start(kind)
        pieces = describe_zero(engine)
        with torch.no_grad():
            for piece in pieces:
                piece.tensor.fill_(3)  # a gathered or rounded copy that is not rebuilt still has other values
        load(directory, pieces, cast=kind[2] == 16)
        if publish:
            publish_zero(engine)
        if kind[2] == 32:
            assert_same(whole(describe_zero(engine)), saved)
        # The first forward is that of an engine that was made from the same tensors.
        model = Model()
        model.load_state_dict({name.partition("/")[2]: tensor for name, tensor in saved.items() if name[0] in "mb"})
        assert torch.equal(forward(engine), forward(start(kind, model))), kind
        train_engine(engine, [3, 4])
        tolerance = 1e-5 if kind[2] == 32 else 3e-2
        for name, tensor in whole(describe_zero(engine)).items():
            if not name.startswith("buffer/"):  # which counts this rank's samples
                torch.testing.assert_close(tensor.float(), expected[f"later/{name}"], rtol=tolerance, atol=tolerance)


def alone(directory: Path) -> dict[str, torch.Tensor]:
    model = Model()
    optimizer = optimizer_of(model)
    train_alone(model, optimizer, [1, 2])
    save(directory, 2, describe(model, optimizer))
    saved = whole(describe(model, optimizer))
    train_alone(model, optimizer, [3, 4])
    return saved | {f"later/{name}": tensor for name, tensor in whole(describe(model, optimizer)).items()}


def test_what_torch_saves_every_stage_loads(tmp_path: Path, world: SharedWorld) -> None:
    expected = alone(tmp_path)
    world.run(load_and_go_on, 3, str(tmp_path), ENGINES, expected, True)
    # Masters of low-precision engines are full; what they compute is rounded.
    world.run(load_and_go_on, 2, str(tmp_path), LOW, expected, True)


@pytest.mark.parametrize("kind", [(1, False, 32), (2, True, 32), (3, False, 32), (2, False, 16), (3, False, 16)])
def test_without_publishing_the_first_forward_is_another(tmp_path: Path, kind: Kind, world: SharedWorld) -> None:
    expected = alone(tmp_path)
    with pytest.raises(AssertionError, match=r"assert torch\.equal\(forward\(engine\)"):
        world.run(load_and_go_on, 2, str(tmp_path), [kind], expected, False)


@pytest.mark.parametrize("kind", ENGINES)
def test_what_a_stage_saves_torch_and_other_stages_load(tmp_path: Path, kind: Kind, world: SharedWorld) -> None:
    expected = world.run(save_and_go_on, 2, str(tmp_path), kind)[0]
    model = Model()
    optimizer = optimizer_of(model)
    load(tmp_path, describe(model, optimizer))
    assert_same(whole(describe(model, optimizer)), {n: t for n, t in expected.items() if not n.startswith("later/")})
    train_alone(model, optimizer, [3, 4])
    for name, tensor in whole(describe(model, optimizer)).items():
        if not name.startswith("buffer/"):
            torch.testing.assert_close(tensor, expected[f"later/{name}"], rtol=1e-5, atol=1e-5)
    others = [other for other in ENGINES if other[0] in (1, 3) and other != kind]
    world.run(load_and_go_on, 3, str(tmp_path), others, expected, True)


def test_what_cannot_be_described_is_refused() -> None:
    unknown = SimpleNamespace(optimizer=SimpleNamespace(), module=Model())
    with pytest.raises(LayoutError, match="it is not known what a SimpleNamespace of DeepSpeed holds"):
        describe_zero(unknown)
    on_nvme = SimpleNamespace(fp32_partitioned_groups_flat=[], swap_optimizer=True, params_in_nvme_and_cpu=False)
    with pytest.raises(LayoutError, match="NVMe"):
        describe_zero(SimpleNamespace(optimizer=on_nvme, module=Model()))
