"""DeepSpeed's options: ours, and those of a user's own JSON that do not contradict them.

Pure: DeepSpeed is not imported, so that a contradiction is refused before anything starts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trainer.errors import Refused
from trainer.options.config import Config
from trainer.options.optimizer import Implementation
from trainer.plan import TAKING_APART, Topology

BUCKET = 500_000_000  # elements reduced at a time, at most: DeepSpeed's default, allocated however small the model is

# What would change the result of a run, or keep state where no checkpoint sees it.
UNSUPPORTED = (
    "amp",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "managed_gradient_accumulation",
    "sparse_gradients",
    "activation_checkpointing",
    "compression_training",
    "data_efficiency",
    "curriculum_learning",
    "hybrid_engine",
    "autotuning",
    "elasticity",
    "checkpoint",
    "tensor_parallel",
    "expert_parallel",
    "pipeline",
    "sequence_parallel_size",
    "data_parallel_size",
    "zero_optimization.zenflow",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
)


def check_deepspeed(config: Config, topology: Topology) -> None:
    """`Refused` for degrees that DeepSpeed's engine does not have, and a JSON that contradicts the configuration."""
    for key in TAKING_APART:
        if (degree := getattr(topology, key)) > 1:
            raise Refused(
                f"parallel.{key}={degree}: DeepSpeed's engine shards over all processes, by parallel.zero_stage. "
                f"Type parallel.{key}=1, or parallel=fsdp parallel.{key}={degree}."
            )
    if (kind := config.optimizer.implementation) is Implementation.torchao_8bit:
        raise Refused(
            f"optimizer.implementation={kind.value} keeps moments in blocks of rows, and DeepSpeed cuts parameters "
            "anywhere. Type optimizer.implementation=fused, or parallel=fsdp."
        )
    if config.parallel.offload and config.parallel.zero_stage == 0:
        raise Refused(
            "parallel.offload=true moves what ZeRO partitions, and parallel.zero_stage=0 partitions nothing. "
            "Type parallel.zero_stage=1, or parallel.offload=false."
        )
    user_options(config)


def engine_options(config: Config, num_trained: int) -> dict[str, Any]:
    """The whole configuration for `deepspeed.initialize`."""
    stage, given = config.parallel.zero_stage, user_options(config)
    zero = {
        "reduce_bucket_size": min(BUCKET, max(1, num_trained)),
        **given.get("zero_optimization", {}),
        "stage": stage,
    }
    if config.parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "steps_per_print": sys.maxsize,
        **given,
        # Its arithmetic of batches is not ours: it is called once a part, and told when that was the last.
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, as in every engine
        "zero_force_ds_cpu_optimizer": False,
    }


def user_options(config: Config) -> dict[str, Any]:
    """Options that parallel.deepspeed adds. `auto` leaves one to us; one that is so anyway may stand there."""
    given = config.parallel.deepspeed
    if given is None:
        return {}
    options: dict[str, Any]
    where = "parallel.deepspeed" if isinstance(given, dict) else str(given)
    if isinstance(given, dict):
        options = _without_auto(given)
        _check_form(where, options)
    else:
        options = read_options(Path(where))
    _settle_precision(config, options, where)
    for key, (agreed, override) in _ours(config).items():
        if (value := _take(options, key)) is not None and _plain(value) != _plain(agreed):
            raise Refused(
                f"{where} says {key}={json.dumps(value)}, which the trainer sets itself"
                + (f", to {json.dumps(agreed)} in this run" if agreed is not None else "")
                + f". Take it out, and type {override.format(value=value)}."
            )
    for key in UNSUPPORTED:
        if (value := _take(options, key)) is not None and _plain(value) not in (None, False, {"enabled": False}):
            raise Refused(
                f"{where} says {key}={json.dumps(value)}, which would make this run another one than under the other "
                "layouts, or hide state from checkpoints. Take it out."
            )
    zero = options.get("zero_optimization", {})
    if not zero.get("compute_grad_norm", True) or zero.get("offload_param", {}).get("device") == "nvme":
        raise Refused(
            f"{where} turns compute_grad_norm off or moves offload_param to nvme, and a run needs its gradient's norm "
            "and parameters that a checkpoint can read. Take it out."
        )
    return options


def read_options(path: Path) -> dict[str, Any]:
    """DeepSpeed's own JSON, without what it leaves to us. `Refused` if it cannot be read."""
    try:
        options: dict[str, Any] = _without_auto(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise Refused(f"parallel.deepspeed={path} cannot be read as JSON: {error}. Give another file.") from None
    _check_form(f"parallel.deepspeed={path}", options)
    return options


def _check_form(where: str, options: Any) -> None:
    if not isinstance(options, dict) or not isinstance(options.get("zero_optimization", {}), dict):
        raise Refused(f"{where} does not hold DeepSpeed's options as a JSON object. Give others.")


def _ours(config: Config) -> dict[str, tuple[Any, str]]:
    """Values that the trainer sets, in DeepSpeed's words, each with the override that sets another."""
    train, parallel = config.train, config.parallel
    return {
        "train_batch_size": (train.global_batch, "train.global_batch={value}"),
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch={value}"),
        "gradient_accumulation_steps": (None, "train.global_batch=N train.micro_batch=N, from which it follows"),
        "gradient_clipping": (config.optimizer.clip, "optimizer.clip={value}"),
        "optimizer": (None, "optimizer.lr=X, optimizer.weight_decay=X and so on: it is always AdamW"),
        "scheduler": (None, "schedule=cosine, schedule=linear or schedule=constant"),
        "zero_optimization.stage": (parallel.zero_stage, "parallel.zero_stage={value}"),
        "zero_optimization.offload_optimizer": (
            {"device": "cpu" if parallel.offload else "none"},
            f"parallel.offload={'false' if parallel.offload else 'true'}",
        ),
    }


def _settle_precision(config: Config, options: dict[str, Any], where: str) -> None:
    """Take out its blocks of fp16 and bf16, where they say what is so, or nothing because they are off."""
    for low in ("fp16", "bf16"):
        block, on = options.pop(low, None) or {}, config.precision.compute.name == low
        if not isinstance(block, dict) or block.get("enabled", on) != on:
            raise Refused(
                f"{where} says {low}={json.dumps(block)}, which the trainer sets itself, to "
                f"{json.dumps({'enabled': on})} in this run. Take it out, and type precision={'fp32' if on else low}."
            )
        scaling = {key: value for key, value in block.items() if key != "enabled"}
        if on and {key: value for key, value in scaling.items() if (key, value) != ("loss_scale", 0)}:
            raise Refused(
                f"{where} says how {low} is computed, {json.dumps(scaling)}, and the trainer does it alike in every "
                "layout: masters of fp32, and in fp16 a dynamic loss scale of its own. Take that out."
            )


def _plain(value: Any) -> Any:
    """Reduce an option to what matters: a feature that is off is off, and pinned memory is CPU memory."""
    if isinstance(value, dict):
        if value.get("enabled") is False:
            return {"enabled": False}
        return {key: one for key, one in value.items() if key != "pin_memory"}
    return value


def _take(options: dict[str, Any], key: str) -> Any:
    """The option of a dotted key, removed; None where it is not given."""
    group, _, name = key.rpartition(".")
    return (options.get(group, {}) if group else options).pop(name, None)


def _without_auto(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    kept = {key: _without_auto(value) for key, value in given.items() if value != "auto"}
    return {key: value for key, value in kept.items() if value != {}}
