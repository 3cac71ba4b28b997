"""What DeepSpeed is told, and what of a user's JSON is taken over or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.compose import compose
from trainer.errors import Refused
from trainer.parallel.deepspeed_options import check_deepspeed, engine_options
from trainer.plan import Topology

ZERO2 = ["parallel=zero2"]


def options(tmp_path: Path, given: Any, overrides: list[str] = ZERO2) -> dict[str, Any]:
    path = tmp_path / "deepspeed.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return engine_options(compose([*overrides, f"parallel.deepspeed={path}"]), 1000)


def test_options_of_the_trainer() -> None:
    found = engine_options(compose(["parallel=zero3", "parallel.offload=true", "optimizer.clip=0.5"]), 1000)
    assert found["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu"},
    }
    assert found["gradient_clipping"] == 0.5 and found["gradient_accumulation_steps"] == 1
    assert "bf16" not in engine_options(compose(["parallel=zero1", "precision=bf16"]), 1)
    assert engine_options(compose(["parallel.engine=deepspeed"]), 1)["gradient_clipping"] == 0  # ours in stage 0


def test_what_a_file_adds_is_taken_over(tmp_path: Path) -> None:
    given = {
        "wall_clock_breakdown": True,
        "train_batch_size": "auto",
        "optimizer": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": False,
            "reduce_bucket_size": 77,
            "contiguous_gradients": "auto",
        },
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": 2,
    }
    found = options(tmp_path, given)
    assert found["wall_clock_breakdown"] is True and "optimizer" not in found and "fp16" not in found
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 77}
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    assert options(tmp_path, offload, [*ZERO2, "parallel.offload=true"])["zero_optimization"]["offload_optimizer"]
    assert options(tmp_path, {"bf16": {"enabled": True}}, [*ZERO2, "precision=bf16"])
    usual = {"fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}}
    for precision in ("fp32", "bf16"):  # it is off
        assert "fp16" not in options(tmp_path, usual, [*ZERO2, f"precision={precision}"])
    with pytest.raises(Refused, match=r"says how fp16 is computed, .*loss_scale_window.* Take that out"):
        options(tmp_path, usual, [*ZERO2, "precision=fp16"])
    for on in (True, "auto"):
        assert options(tmp_path, {"fp16": {"enabled": on, "loss_scale": 0}}, [*ZERO2, "precision=fp16"])


def test_options_may_stand_on_the_command_line() -> None:
    config = compose([*ZERO2, "parallel.deepspeed={zero_optimization: {overlap_comm: true, reduce_bucket_size: auto}}"])
    assert engine_options(config, 1000)["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 1000,
    }
    config = compose([*ZERO2, "parallel.deepspeed={zero_optimization: {stage: 3}}"])
    with pytest.raises(
        Refused, match=r"^parallel\.deepspeed says zero_optimization\.stage=3, .* parallel\.zero_stage=3"
    ):
        check_deepspeed(config, Topology(2))
    with pytest.raises(Refused, match=r"^parallel\.deepspeed does not hold DeepSpeed's options"):
        check_deepspeed(compose([*ZERO2, "parallel.deepspeed={zero_optimization: 3}"]), Topology(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"train_batch_size": 64},
            r"train_batch_size=64, which the trainer sets itself, to 8 in this run.* type train\.global_batch=64\.",
        ),
        ({"train_micro_batch_size_per_gpu": 1}, r"type train\.micro_batch=1\."),
        ({"gradient_accumulation_steps": 4}, r"type train\.global_batch=N train\.micro_batch=N"),
        ({"gradient_clipping": 0.3}, r"type optimizer\.clip=0\.3\."),
        ({"optimizer": {"type": "Lamb"}}, r"type optimizer\.lr=X"),
        ({"scheduler": {"type": "WarmupLR"}}, r"type schedule=cosine"),
        ({"fp16": {"enabled": True}}, r"type precision=fp16\."),
        ({"bf16": {"enabled": True}}, r"type precision=bf16\."),
        ({"zero_optimization": {"stage": 3}}, r"type parallel\.zero_stage=3\."),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"type parallel\.offload=true\."),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"offload_param to nvme"),
        ({"zero_optimization": {"compute_grad_norm": False}}, r"compute_grad_norm off"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, r"another one than under the other layouts"),
        ({"tensor_parallel": {"autotp_size": 2}}, r"another one than under the other layouts"),
        ([1], r"does not hold DeepSpeed's options as a JSON object"),
        ({"zero_optimization": True}, r"does not hold DeepSpeed's options as a JSON object"),
        ("{", r"cannot be read as JSON"),
    ],
)
def test_what_contradicts_the_run_is_refused(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(Refused, match=message):
        options(tmp_path, given)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"none\.json cannot be read"):
        check_deepspeed(compose([*ZERO2, f"parallel.deepspeed={tmp_path / 'none.json'}"]), Topology(2))


@pytest.mark.parametrize(("degree", "value"), [("tp", 2), ("pp", 2), ("dp_shard", 2)])
def test_other_degrees_are_refused(degree: str, value: int) -> None:
    with pytest.raises(Refused, match=rf"parallel\.{degree}=2: DeepSpeed's engine .* Type parallel\.{degree}=1"):
        check_deepspeed(compose(ZERO2), Topology(**{degree: value}))


def test_offloading_what_is_not_partitioned_is_refused() -> None:
    with pytest.raises(Refused, match=r"Type parallel\.zero_stage=1, or parallel\.offload=false"):
        check_deepspeed(compose(["parallel.engine=deepspeed", "parallel.offload=true"]), Topology(2))


@pytest.mark.parametrize("override", ["zero_stage=2", "offload=true", "deepspeed=x.json"])
def test_options_of_deepspeed_mean_nothing_to_torch(override: str) -> None:
    with pytest.raises(Refused, match=r"is an option of DeepSpeed only"):
        compose([f"parallel.{override}"])
