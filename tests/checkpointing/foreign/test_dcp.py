"""What torch.distributed.checkpoint saved, imported: bit for bit what the ranks held."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpointing import DamagedError, MismatchError, describe, load, save
from checkpointing.diff import compare
from checkpointing.foreign import describe_foreign
from tests.checkpointing.foreign.test_deepspeed import reader
from tests.checkpointing.zero_engines import Model, optimizer_of, train_alone
from tests.harness.worlds import SharedWorld

FORMS = ["nested", "flattened", "apart", "merged"]


def train_and_save(directory: str, dtype: torch.dtype) -> str:
    """Two steps under FSDP2; saved by torch in each form, and by us."""
    model = Model().to(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.inner, model.norm, model.frozen):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    train_alone(model, optimizer, [1, 2])
    ours = save(Path(directory, "ours"), 2, describe(model, optimizer))
    weights = get_model_state_dict(model)
    state = get_optimizer_state_dict(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"model": weights, "optim": state, "extra": {"epoch": 3}}, checkpoint_id=Path(directory, "nested"))
    dcp.save({"model": weights, "optim": flat}, checkpoint_id=Path(directory, "flattened"))
    dcp.save({**weights, "optimizer": flat}, checkpoint_id=Path(directory, "merged"))
    dcp.save({"model": weights}, checkpoint_id=Path(directory, "apart", "pytorch_model_fsdp_0"))
    dcp.save({"optimizer": state}, checkpoint_id=Path(directory, "apart", "optimizer_0"))
    dcp.save({"model": weights, "ema": weights}, checkpoint_id=Path(directory, "twice"))
    dcp.save({"model": weights, "optim": optimizer.state_dict()}, checkpoint_id=Path(directory, "numbered"))
    return ours


def differing(tmp_path: Path, ours: str, foreign: Any, name: str) -> list[tuple[str, str]]:
    theirs = save(tmp_path / f"{name}-imported", 2, foreign.pieces)
    found = compare(reader(tmp_path / "ours", ours), reader(tmp_path / f"{name}-imported", theirs))
    return [(d.name, d.state) for d in found if d.state != "equal"]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_import_holds_what_the_ranks_held(tmp_path: Path, size: int, dtype: torch.dtype, world: SharedWorld) -> None:
    ours = world.run(train_and_save, size, str(tmp_path), dtype)[0]
    for form in FORMS:
        foreign = describe_foreign(tmp_path / form, trust_pickle=True)
        assert foreign.step == 2
        # torch has a tied one's moments under one name; what has none may be a buffer, and has two names here.
        known = {(f"optim/head.weight/{key}", "only in a") for key in ("exp_avg", "exp_avg_sq", "step")}
        twice = {"buffer/head.weight", "buffer/frozen.weight", "buffer/frozen.bias", "model/seen"}
        known |= {(name, "only in b") for name in twice}
        assert set(differing(tmp_path, ours, foreign, form)) == known, form
        model = Model().to(dtype)
        optimizer = optimizer_of(model)
        assert model.seen == 0
        load(tmp_path / f"{form}-imported", describe(model, optimizer))  # all of it, the buffer and the tied one too
        assert model.seen > 0 and optimizer.state[model.head.weight]["step"] == 2
    left_out = set(describe_foreign(tmp_path / "nested", trust_pickle=True).left_out)
    assert "extra.epoch" in left_out and all(name.startswith(("extra.", "optim.param_groups")) for name in left_out)
    # Several models are told apart by hand.
    with pytest.raises(MismatchError, match=r"There are tensors under ema, model that .* --ignore ema\."):
        describe_foreign(tmp_path / "twice", trust_pickle=True)
    alone = describe_foreign(tmp_path / "twice", trust_pickle=True, ignored=["ema"])
    assert {p.name.partition("/")[0] for p in alone.pieces} == {"model", "buffer"} and alone.step is None
    with pytest.raises(MismatchError, match=r"numbers its parameters.* --ignore optim "):
        describe_foreign(tmp_path / "numbered", trust_pickle=True)
    assert not describe_foreign(tmp_path / "numbered", trust_pickle=True, ignored=["optim"]).has_optimizer
    # The control: one element of one chunk.
    foreign = describe_foreign(tmp_path / "nested", trust_pickle=True)
    next(p for p in foreign.pieces if p.name == "optim/inner.bias/exp_avg").tensor[0] += 1
    assert ("optim/inner.bias/exp_avg", "different") in differing(tmp_path, ours, foreign, "changed")


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.arange(5.0)}}, checkpoint_id=tmp_path / "whole", no_dist=True)
    assert [p.name for p in describe_foreign(tmp_path / "whole", trust_pickle=True).pieces] == ["model/w", "buffer/w"]
    file = next((tmp_path / "whole").glob("*.distcp"))
    data = file.read_bytes()
    for kept in (len(data) - 1, 1, 0):
        file.write_bytes(data[:kept])
        with pytest.raises(DamagedError, match=file.name):
            describe_foreign(tmp_path / "whole", trust_pickle=True)
    metadata = tmp_path / "whole" / ".metadata"
    for content in (b"", metadata.read_bytes()[:-20], pickle.dumps({"a": 1})):
        metadata.write_bytes(content)
        with pytest.raises(DamagedError, match="metadata"):
            describe_foreign(tmp_path / "whole", trust_pickle=True)


def test_what_is_no_model_is_not_taken_for_one(tmp_path: Path) -> None:
    state = {"model": {"state.proj.weight": torch.ones(2), "b": torch.ones(1)}, "rng": torch.zeros(3)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(MismatchError, match=r"under model, no path that are no optimizer's.* --ignore rng\."):
        describe_foreign(tmp_path, trust_pickle=True)
    found = describe_foreign(tmp_path, trust_pickle=True, ignored=["rng"])
    assert {p.name for p in found.pieces if p.name.startswith("model/")} == {"model/state.proj.weight", "model/b"}
    assert found.step is None and found.left_out == ["rng"]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Odd()))
    with pytest.raises(DamagedError, match="of a form that is not known here"):
        describe_foreign(tmp_path, trust_pickle=True)


class Odd:
    """Has all that metadata has, of other kinds inside."""

    def __init__(self) -> None:
        self.state_dict_metadata, self.storage_data, self.planner_data = {"x": 1}, {"x": 1}, {}
