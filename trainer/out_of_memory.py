"""Memory that does not suffice: what to change, what costs least first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from checkpointing.errors import reason_of
from trainer.errors import TrainingFailed
from trainer.options.config import Config
from trainer.options.method import Full
from trainer.options.optimizer import Implementation
from trainer.options.precision import Compute


@contextmanager
def explained(config: Config, device: torch.device) -> Iterator[None]:
    """An allocation that fails inside becomes `TrainingFailed` with what to type."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        what = "a GPU's memory" if device.type == "cuda" else "memory"
        said = reason_of(error)
        raise TrainingFailed(
            f"Training does not fit into {what}: {said} Type, in this order, as much of it as it takes: "
            f"{'; '.join(remedies(config))}. What was saved before stays as it is."
        ) from error


def ran_out(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def remedies(config: Config) -> list[str]:
    """Remedies for too little memory: first what leaves the result as it is, last what trains something else."""
    parallel, found = config.parallel, []
    rows = min(parallel.local_batch or config.train.micro_batch, config.train.micro_batch)
    if rows > 1:
        found.append(f"parallel.local_batch={rows // 2} (smaller parts of a micro-batch)")
    if not parallel.activation_checkpointing:
        found.append("parallel.activation_checkpointing=true (about a third more computing)")
    if parallel.uses_deepspeed:
        if parallel.zero_stage < 3:
            found.append(f"parallel.zero_stage={parallel.zero_stage + 1} (shards more)")
        if not parallel.offload:
            found.append("parallel.offload=true (the optimizer in CPU memory)")
    elif parallel.dp_shard == 1:
        found.append("parallel=fsdp (shards parameters and optimizer over the processes)")
    else:
        found.append("more processes, or parallel=zero3 parallel.offload=true (the optimizer in CPU memory)")
    if config.precision.compute is Compute.fp32:
        found.append("in a new run precision=bf16 (half the activations)")
    low = config.optimizer.implementation is Implementation.torchao_8bit
    if isinstance(config.method, Full) and not (low or parallel.uses_deepspeed):
        found.append(
            "in a new run optimizer=adamw_8bit (a quarter of the optimizer's state, where rows are multiples of 256)"
        )
    found.append(f"in a new run train.seq_len={max(1, config.train.seq_len // 2)} (shorter samples)")
    if isinstance(config.method, Full):
        found.append("in a new run method=lora (trains adapters only)")
    return found
