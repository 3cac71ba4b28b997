"""One process of a machine reads a model: the others have the same tensors, and copies of what they write to."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointing.collective import Team
from tests.harness.models import save_tiny_model
from tests.harness.worlds import SharedWorld
from tests.trainer.parallel.zoo import MODELS, save_model
from trainer.models import build_model, shared_weights
from trainer.models.shared_weights import read_once
from trainer.options.model import HuggingFace


def held(model: nn.Module) -> dict[str, tuple[torch.Tensor, bool, bool]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        name: (tensor.detach().clone(), tensor.requires_grad, type(tensor) is nn.Parameter) for name, tensor in named
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][0], b[n][0]) and a[n][1:] == b[n][1:] for n in a)


def mapped_bytes(kind: str) -> int:
    """Of lent memory in this process, as the kernel counts it: `Rss` what it looked at, `Anonymous` what it wrote."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = "memfd:model" in line
        elif inside and line.startswith(f"{kind}:"):
            total += 1024 * int(line.split()[1])
    return total


def read_together(directory: str) -> dict[str, Any]:
    reads = []
    original = shared_weights.Lent.of

    def counted(model: nn.Module) -> Any:
        reads.append(1)
        return original(model)

    shared_weights.Lent.of = counted  # type: ignore[assignment]
    try:
        config, team = HuggingFace(path=directory), Team()
        model = build_model(config, seq_len=8, seed=0, team=team)
    finally:
        shared_weights.Lent.of = original
    alone = build_model(config, seq_len=8, seed=0)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        equal = torch.equal(model.eval()(input_ids=tokens).logits, alone.eval()(input_ids=tokens).logits)
    found = {"reads": len(reads), "same": same(held(model), held(alone)), "equal": equal, "size": len(held(model))}
    found["tied"] = len(list(model.parameters())) == len(list(alone.parameters()))
    found["clean"] = mapped_bytes("Anonymous"), mapped_bytes("Rss") > 0
    # What one writes is its own.
    parameter = next(model.parameters())
    with torch.no_grad():
        parameter.fill_(team.rank + 1)
    team.together(lambda: None)
    found["own"] = bool((parameter == team.rank + 1).all())
    found["wrong"] = same(held(model), held(alone))
    found["dirty"] = mapped_bytes("Anonymous") > 0
    del model, parameter
    found["left"] = mapped_bytes("Rss")
    found["files"] = sum(
        "memfd:model" in os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if alive(n)
    )
    return found


def alive(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def test_others_map_what_one_has_read(tmp_path: Path, world: SharedWorld) -> None:
    save_tiny_model(tmp_path / "gpt2", "gpt2", torch.bfloat16)
    for name in ("llama_tied", "mixtral", "gemma"):
        assert name in MODELS
        save_model(tmp_path / name, name)
    for name in ("gpt2", "llama_tied", "mixtral", "gemma"):
        results = world.run(read_together, 3, str(tmp_path / name))
        assert [r["reads"] for r in results] == [1, 0, 0]
        for r in results:
            assert r["same"] and r["equal"] and r["tied"] and r["size"] > 10, name
            assert r["own"] and r["dirty"] and not r["wrong"]  # and the comparison sees a tensor that differs
            assert (r["left"], r["files"]) == (0, 0)
        assert [r["clean"] for r in results[1:]] == [(0, True)] * 2


def small() -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 0))
    model[0].bias.requires_grad_(False)
    model.same = model[0]
    return model


def skeleton() -> nn.Module:
    with torch.device("meta"):
        return small()


def odd(how: str) -> dict[str, Any]:
    """Where the memory cannot be had, a process reads by itself."""
    team, reads = Team(), []

    def read() -> nn.Module:
        reads.append(1)
        return small()

    def other() -> nn.Module:
        model = skeleton()
        if how == "another skeleton":
            model.more = nn.Linear(2, 2, device="meta")
        elif how == "a tensor that is no parameter":
            model[0].table = torch.empty(3, device="meta")
        elif how == "one in a list":
            model[0].tables = {"a": [torch.empty(3, device="meta")]}
        return model

    told, of = shared_weights.Lent.told, shared_weights.Lent.of
    if how == "another process":
        shared_weights.Lent.told = lambda self: {**told(self), "file": 0}  # type: ignore[method-assign]
    elif how == "no memory":
        shared_weights.Lent.of = lambda model: os.memfd_creat  # type: ignore[attr-defined,assignment]
    try:
        model = read_once(read, other, team)
    finally:
        shared_weights.Lent.told, shared_weights.Lent.of = told, of  # type: ignore[method-assign]
    return {"reads": len(reads), "same": same(held(model), held(small()))}


@pytest.mark.parametrize(
    "how",
    ["", "another skeleton", "a tensor that is no parameter", "one in a list", "another process", "no memory"],
)
def test_what_cannot_be_mapped_is_read(how: str, world: SharedWorld) -> None:
    results = world.run(odd, 2, how)
    assert [r["reads"] for r in results] == [1, 1 if how else 0] and all(r["same"] for r in results)


class Counting(Team):
    """Collectives so far, and an event after the fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.turns, self.fifth = 0, threading.Event()

    def together(self, action: Any) -> list[Any]:
        self.turns += 1
        if self.turns == 5:
            self.fifth.set()
        return super().together(action)


def slow(fails: bool) -> str:
    team, before = Counting(), shared_weights.TURN_S

    def read() -> nn.Module:
        assert team.fifth.wait(60)
        if fails:
            raise ValueError("the files are damaged")
        return small()

    shared_weights.TURN_S = 0.01
    try:
        return str(same(held(read_once(read, skeleton, team)), held(small())))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shared_weights.TURN_S = before


def test_a_read_may_take_longer_than_a_collective_and_fails_on_all(world: SharedWorld) -> None:
    assert world.run(slow, 2, False) == ["True", "True"]
    assert world.run(slow, 2, True) == [
        "ValueError: the files are damaged",
        "PeerError: rank 0: the files are damaged",
    ]


def on_two_machines(fails: bool) -> tuple[int, str]:
    """As if ranks 0 and 2 were on one, and 1 and 3 on another."""
    team, before, reads = Team(), shared_weights.pid_space, []

    def read() -> nn.Module:
        reads.append(1)
        if fails and team.rank == 1:
            raise ValueError("the files are damaged")
        return small()

    shared_weights.pid_space = lambda: ("host", str(team.rank % 2), "")
    try:
        return len(reads), str(same(held(read_once(read, skeleton, team)), held(small())))
    except Exception as error:
        return len(reads), f"{type(error).__name__}: {error}"
    finally:
        shared_weights.pid_space = before


def test_one_process_of_each_machine_reads(world: SharedWorld) -> None:
    results = world.run(on_two_machines, 4, False)
    assert [told for _, told in results] == ["True"] * 4
    results = world.run(on_two_machines, 4, True)
    own, others = "ValueError: the files are damaged", "PeerError: rank 1: the files are damaged"
    assert [told for _, told in results] == [others, own, others, others]


def test_one_process_reads_by_itself() -> None:
    model = small()
    assert read_once(lambda: model, lambda: nn.Linear(1, 1), Team()) is model
