"""Describing a model and its optimizer: names, completeness, and a fresh optimizer's state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointing import (
    LayoutError,
    MismatchError,
    describe,
    load,
    materialize,
    param_groups,
    parameter_names,
    restore_param_groups,
    save,
)
from checkpointing.generations import read_manifest
from checkpointing.storage import FileStorage


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 3)  # a child with the name that DistributedDataParallel uses
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
        self.tied = self.module
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.norm(self.module(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(0)
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_names_are_logical_and_complete() -> None:
    model = Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    names = {p.name for p in describe(model, optimizer)}
    trained = {"module.weight", "module.bias", "tied.weight", "tied.bias", "norm.weight", "norm.bias"}
    expected = {f"model/{n}" for n in trained | {"frozen.weight"}}
    expected |= {f"buffer/norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    expected |= {f"optim/{n}/{key}" for n in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names == expected


def test_wrappers_leave_no_trace_in_names() -> None:
    model = Model()
    plain = {p.name for p in describe(model)}
    compiled = torch.compile(model)
    assert {p.name for p in describe(compiled)} == plain  # type: ignore[arg-type]

    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:  # without a process group
            nn.Module.__init__(self)
            self.module = module

    for wrapped in (Wrapped(model), torch.compile(Wrapped(model)), Wrapped(compiled)):  # type: ignore[arg-type]
        assert {p.name for p in describe(wrapped)} == plain  # type: ignore[arg-type]


OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_fresh_optimizer_can_be_loaded_into(tmp_path: Path, kind: str) -> None:
    def build() -> tuple[Model, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = Model()
        return model, OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])

    model, optimizer = build()
    train(model, optimizer, 3)
    save(tmp_path, 3, describe(model, optimizer))
    train(model, optimizer, 2)

    resumed, fresh = build()
    load(tmp_path, describe(resumed, fresh))
    train(resumed, fresh, 2)
    for (name, a), (_, b) in zip(model.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    if fresh.state and kind != "plain sgd":
        # The comparison can fail: without the moments the same two steps end elsewhere.
        forgetful, cold = build()
        load(tmp_path, describe(forgetful), only=["model/", "buffer/"])
        train(forgetful, cold, 2)
        assert not torch.equal(forgetful.module.weight, model.module.weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_materialize_changes_nothing_else(kind: str) -> None:
    torch.manual_seed(1)
    model = Model()
    with torch.no_grad():
        model.module.bias.copy_(torch.tensor([0.0, -0.0, 1.0]))  # signs of zero included
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(5, 4)).square().sum().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    rates = [group["lr"] for group in optimizer.param_groups]
    materialize(optimizer)
    for name, parameter in model.named_parameters():
        assert parameter.detach().view(torch.int32).equal(before[name].view(torch.int32)), name
        assert name not in gradients or torch.equal(parameter.grad, gradients[name])  # type: ignore[arg-type]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(float(state["step"]) == 0 for state in optimizer.state.values() if "step" in state)


def test_a_materialized_optimizer_takes_the_same_first_step() -> None:
    results = []
    for prepare in (lambda o: None, materialize):
        torch.manual_seed(1)
        model = Model()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        prepare(optimizer)
        train(model, optimizer, 2)
        results.append(model.module.weight.detach().clone())
    assert torch.equal(*results)


def test_state_that_cannot_be_described_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    materialize(optimizer)
    optimizer.state[model.weight]["count"] = 3
    with pytest.raises(LayoutError, match="keeps count as a int"):
        describe(model, optimizer)
    stranger = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(LayoutError, match="not in the model"):
        describe(model, stranger)


class Undescribable(Model):
    def get_extra_state(self) -> dict:
        return {"scale": 2}


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    describe(Undescribable())
    assert "the extra state of the model (Undescribable) is not described" in caplog.text


NOT_NEUTRAL: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("kind", NOT_NEUTRAL)
def test_an_optimizer_that_describing_would_change_is_refused_before_its_first_step(kind: str) -> None:
    model = Model()
    optimizer = NOT_NEUTRAL[kind]([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(LayoutError, match=r"has no state yet .* Take its first step"):
        describe(model, optimizer)
    assert not optimizer.state
    train(model, optimizer, 1)
    if kind != "asgd" and kind != "rprop":  # these keep plain numbers too
        describe(model, optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_describing_before_the_first_step_changes_nothing(kind: str) -> None:
    results = []
    for look in (False, True):
        torch.manual_seed(1)
        model = Model()
        optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
        if look:
            describe(model, optimizer)
        train(model, optimizer, 3)
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


class Untied(nn.Module):
    """The model above with two modules in the place of the one that is tied."""

    def __init__(self) -> None:
        super().__init__()
        whole = Model()
        self.module, self.norm, self.frozen = whole.module, whole.norm, whole.frozen
        self.tied = nn.Linear(4, 3)


def test_tied_tensors_are_stored_once_and_load_into_both_names(tmp_path: Path) -> None:
    model = Model()
    name = save(tmp_path, 1, describe(model))
    manifest = read_manifest(FileStorage(tmp_path), name)
    assert manifest.aliases == {"model/tied.weight": "model/module.weight", "model/tied.bias": "model/module.bias"}
    assert sum(n.endswith(("module.weight", "tied.weight")) for n in manifest.tensors) == 1
    untied, tied = Untied(), Model()
    load(tmp_path, describe(untied))
    load(tmp_path, describe(tied))
    for other in (untied, tied):
        assert torch.equal(other.tied.weight, model.module.weight)
        assert torch.equal(other.module.weight, model.module.weight)


def test_what_was_saved_apart_is_tied_only_where_it_is_equal(tmp_path: Path) -> None:
    apart = Untied()
    save(tmp_path, 1, describe(apart))
    with pytest.raises(MismatchError, match=r"model/tied\.\w+ and model/module\.\w+ are tied here"):
        load(tmp_path, describe(Model()))
    apart.tied.load_state_dict(apart.module.state_dict())
    save(tmp_path, 2, describe(apart))
    model = Model()
    load(tmp_path, describe(model))
    assert torch.equal(model.tied.weight, apart.module.weight)


def test_several_models_and_optimizers_have_names_of_their_own(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        actor, critic = nn.Linear(3, 2), nn.Linear(3, 1)
        return {
            "actor": (actor, torch.optim.AdamW([actor.weight])),
            "critic": (critic, torch.optim.SGD(critic.parameters(), momentum=0.9)),
            "ema": (nn.Linear(3, 2), None),
            "bias": (None, torch.optim.AdamW([actor.bias])),
        }

    first = build()
    pieces = describe(first)
    assert {p.name for p in pieces} >= {
        "model/actor/weight",
        "model/ema/bias",
        "optim/actor/weight/exp_avg",
        "optim/critic/weight/momentum_buffer",
        "optim/bias/actor/bias/exp_avg",
    }
    save(tmp_path, 1, pieces)
    second = build()
    load(tmp_path, describe(second))
    for name in ("actor", "critic", "ema"):
        assert torch.equal(second[name][0].weight, first[name][0].weight)
    with pytest.raises(LayoutError, match="cannot name a model"):
        describe({"a/b": (nn.Linear(1, 1), None)})
    with pytest.raises(LayoutError, match="give the optimizer of each model with it"):
        describe({"a": (nn.Linear(1, 1), None)}, second["actor"][1])


def test_a_padded_vocabulary_is_stored_without_padding_and_loads_with_any(tmp_path: Path) -> None:
    def padded(rows: int) -> tuple[nn.Embedding, torch.optim.Optimizer]:
        embedding = nn.Embedding(rows, 4)
        return embedding, torch.optim.AdamW(embedding.parameters())

    shapes = {"weight": (11, 4)}
    model, optimizer = padded(16)
    model(torch.arange(11)).sum().backward()
    optimizer.step()
    name = save(tmp_path, 1, describe(model, optimizer, logical=shapes))
    stored = read_manifest(FileStorage(tmp_path), name).tensors
    assert {n: t.shape for n, t in stored.items()} == {
        "model/weight": (11, 4),
        "optim/weight/exp_avg": (11, 4),
        "optim/weight/exp_avg_sq": (11, 4),
        "optim/weight/step": (),
    }
    for rows in (11, 12, 40):
        other, state = padded(rows)
        before = other.weight.detach().clone()
        load(tmp_path, describe(other, state, logical=shapes))
        assert torch.equal(other.weight[:11], model.weight[:11])
        assert torch.equal(other.weight[11:], before[11:])
        assert torch.equal(state.state[other.weight]["exp_avg"][:11], optimizer.state[model.weight]["exp_avg"][:11])
    with pytest.raises(LayoutError, match="there is no parameter named embed"):
        describe(model, logical={"embed": (11, 4)})
    with pytest.raises(LayoutError, match="does not hold one of shape"):
        describe(padded(8)[0], logical=shapes)


def grouped(model: nn.Module, first: dict[str, Any], second: dict[str, Any]) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW([{"params": decayed, **first}, {"params": plain, **second}])


def test_options_of_param_groups_come_back_by_the_names_of_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    saved = param_groups(model, grouped(model, {"lr": 0.1, "betas": (0.8, 0.9)}, {"lr": 0.2, "weight_decay": 0.0}))
    saved = json.loads(json.dumps(saved))
    # In another order, with a tensor for a rate, and all of the second group apart.
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rate = torch.tensor(9.0)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": rate} for p in other.parameters() if p.dim() == 1]
        + [{"params": [p for p in other.parameters() if p.dim() > 1]}]
    )
    restore_param_groups(saved, other, optimizer)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.2, 0.2, 0.1])
    assert optimizer.param_groups[0]["lr"] is rate
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.0, 0.01]
    assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.999), (0.9, 0.999), (0.8, 0.9)]
    with pytest.raises(MismatchError, match="were saved with different options"):
        restore_param_groups(saved, other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(MismatchError, match=r"no options of a param group were saved for 0\.bias"):
        restore_param_groups({}, other, optimizer)


def test_an_option_that_is_no_json_is_refused() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(LayoutError, match="the option hook of a param group is a object"):
        param_groups(model, torch.optim.SGD([{"params": model.parameters(), "hook": object()}]))


DECAYED: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    **OPTIMIZERS,
    "adam with decay": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "sgd with decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1, momentum=0.5, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "adagrad with a value": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5, weight_decay=0.1),
    "no epsilon": lambda p: torch.optim.AdamW(p, lr=0.1, eps=0.0),
}


@pytest.mark.parametrize("kind", DECAYED)
def test_describing_changes_nothing_of_what_is_trained(kind: str) -> None:
    """Three steps with and without it end with the same bits, and the state has the same keys, dtypes and strides."""

    def build() -> tuple[Model, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = Model()
        parameters = [p for p in model.parameters() if p.requires_grad]
        parameters[0].data = parameters[0].data.t().contiguous().t()  # not contiguous
        return model, DECAYED[kind](parameters)

    model, optimizer = build()
    describe(model, optimizer)
    assert all(p.grad is None for p in model.parameters())
    train(model, optimizer, 3)
    alone, other = build()
    train(alone, other, 3)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0)), name
        ours, theirs = optimizer.state.get(p, {}), other.state.get(q, {})
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert (
                    torch.equal(value.nan_to_num(7.0), theirs[key].nan_to_num(7.0)) and value.dtype == theirs[key].dtype
                ), (name, key)
                assert value.stride() == theirs[key].stride()


def test_an_optimizer_of_ones_own_takes_its_first_step_itself() -> None:
    class Own(torch.optim.AdamW):
        pass

    model = nn.Linear(2, 2)
    with pytest.raises(LayoutError, match="Own has no state yet"):
        describe(model, Own(model.parameters()))


def test_a_buffer_with_two_names_has_both() -> None:
    module = nn.Module()
    module.register_buffer("x", torch.ones(2))
    module.register_buffer("y", module.x)
    assert {piece.name for piece in describe(module)} == {"buffer/x", "buffer/y"}


def test_a_parameter_that_is_not_in_the_model_is_refused() -> None:
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()])
    for action in (
        lambda: param_groups(model, optimizer),
        lambda: restore_param_groups({}, model, optimizer),
        lambda: describe(model, torch.optim.SGD(other.parameters(), momentum=0.9)),
    ):
        with pytest.raises(LayoutError, match="that is not in the model"):
            action()


class Adapted(nn.Module):
    """As peft wraps: an adapter around a layer, and another around that."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})


def test_an_adapter_around_an_adapter_has_a_name_of_its_own() -> None:
    model = nn.ModuleDict({"q": Adapted(nn.Linear(2, 2)), "experts": Adapted(Adapted(nn.Linear(2, 2)))})
    names = [p.name for p in describe(model)]
    assert len(set(names)) == len(names) == len(list(model.parameters())) == len(parameter_names(model))
    assert {"model/q.weight", "model/q.lora_A.default.weight", "model/experts.weight"} <= set(names)


def test_two_parameters_of_one_name_are_refused() -> None:
    model = nn.ModuleDict({"q": Adapted(nn.Linear(2, 2))})
    model["q"].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(LayoutError, match=r"two parameters are named q\.weight"):
        parameter_names(model)
