"""A generation as torch.distributed.checkpoint loads it: into FSDP2, moments included, and back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpointing import describe, save
from checkpointing.__main__ import main
from checkpointing.diff import compare
from checkpointing.foreign import describe_foreign
from tests.checkpointing.foreign.test_deepspeed import reader
from tests.checkpointing.zero_engines import Model, optimizer_of, train_alone, whole
from tests.harness.worlds import SharedWorld


def saved(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """One generation, and what training went on to after it."""
    model = Model()
    optimizer = optimizer_of(model)
    train_alone(model, optimizer, [1, 2])
    name = save(tmp_path / "ours", 2, describe(model, optimizer))
    train_alone(model, optimizer, [3, 4])
    return name, whole(describe(model, optimizer))


def go_on(directory: str, expected: dict[str, torch.Tensor], with_moments: bool) -> None:
    """As somebody who uses torch alone would."""
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    state = {"model": get_model_state_dict(model)}
    if with_moments:
        state["optim"] = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=directory, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_model_state_dict(model, state["model"])
    if with_moments:
        set_optimizer_state_dict(model, optimizer, state["optim"])
    train_alone(model, optimizer, [3, 4])
    found = whole(describe(model, optimizer))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_torch_goes_on_from_it(tmp_path: Path, size: int, world: SharedWorld) -> None:
    _, expected = saved(tmp_path)
    assert main(["export", str(tmp_path / "ours"), "--to", "dcp", str(tmp_path / "out")]) == 0
    world.run(go_on, size, str(tmp_path / "out"), expected, True)
    with pytest.raises(AssertionError):  # the control
        world.run(go_on, size, str(tmp_path / "out"), expected, False)


def test_there_and_back_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = saved(tmp_path)
    assert main(["export", str(tmp_path / "ours"), "--to", "dcp", str(tmp_path / "out")]) == 0
    back = save(tmp_path / "back", 2, describe_foreign(tmp_path / "out", trust_pickle=True).pieces)
    found = compare(reader(tmp_path / "ours", name), reader(tmp_path / "back", back))
    extra = {"buffer/frozen.bias", "buffer/frozen.weight", "model/seen"}  # which may be either, in a state dict
    assert {d.name for d in found if d.state != "equal"} <= extra | {"buffer/head.weight"}
    assert all(d.state in ("equal", "only in b") for d in found)
    assert main(["export", str(tmp_path / "ours"), "--to", "dcp", str(tmp_path / "out")]) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "ours"), "--to", "dcp", "--dtype", "bf16", str(tmp_path / "low")]) == 0
    low = {p.name: p.tensor for p in describe_foreign(tmp_path / "low", trust_pickle=True).pieces}
    assert low["model/inner.weight"].dtype == torch.bfloat16 and low["model/seen"].dtype == torch.int64
    assert low["optim/inner.weight/exp_avg"].dtype == torch.float32


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.setattr("checkpointing.export_dcp.read_whole", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["export", str(tmp_path / "ours"), "--to", "dcp", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
