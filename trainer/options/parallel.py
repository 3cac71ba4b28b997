"""Options of the layout: which engine, in how many parallel dimensions of which degree."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional

from trainer.errors import Refused
from trainer.options.field import bound, option

# OmegaConf reads these annotations at run time and knows Optional[int], not int | None.


class Engine(Enum):
    torch = "torch"
    accelerate = "accelerate"
    deepspeed = "deepspeed"


# How gradients are reduced, as MODULE:CLASS by name; a class is made of a `Mesh`.
REDUCERS = {"plain": "trainer.parallel.reducing:PlainReducer"}

PipelineSchedule = Enum("PipelineSchedule", ["gpipe", "1f1b", "interleaved"])


@dataclass
class Parallel:
    """Degrees multiply to the number of processes; -1 in at most one place fills the world."""

    engine: Engine = Engine.torch
    dp_replicate: Optional[int] = None  # whole copies (DDP); unset: -1, or 1 where dp_shard is -1
    dp_shard: int = 1  # ways to shard parameters, gradients and optimizer (FSDP2)
    tp: int = 1  # ways to split the heads, the inner width and the vocabulary of every layer (tensor parallel)
    pp: int = 1  # stages that the layers are dealt to (pipeline parallel)
    cp: int = 1  # context parallel: not supported yet
    ep: int = 1  # expert parallel: not supported yet
    pp_schedule: PipelineSchedule = PipelineSchedule["1f1b"]  # interleaved: two stages a process
    activation_checkpointing: bool = False  # compute a layer's forward again in its backward, rather than keep it
    compile: bool = False  # layers, by torch.compile; the first steps take longer
    compile_backend: str = "inductor"  # of torch.compile
    auto: bool = False  # choose the degrees by the memory of model and device; those given are not looked at
    local_batch: Optional[int] = None  # samples in memory at a time; splits a micro-batch, not its result
    reducer: str = bound("plain")  # how gradients of the ranks become one; plain: as DDP, FSDP2 and DeepSpeed do it
    zero_stage: int = option(0, low=0, high=3)  # DeepSpeed shards the optimizer (1), gradients (2), parameters (3)
    offload: bool = False  # DeepSpeed keeps the optimizer's state, and updates, in CPU memory (zero_stage 1 to 3)
    deepspeed: Any = (
        None  # DeepSpeed's own options, as far as they do not contradict ours: {option: value}, or a JSON file
    )

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed trains: by its own engine, or as accelerate sets it up."""
        return self.engine is Engine.deepspeed or (self.engine is Engine.accelerate and self.zero_stage > 0)

    def refuse(self) -> None:
        """Refuse DeepSpeed's options where another engine trains, and a reducer that is unknown or not used."""
        if self.reducer not in REDUCERS:
            raise Refused(
                f"parallel.reducer={self.reducer} is none of {', '.join(sorted(REDUCERS))}. Type "
                "parallel.reducer=plain."
            )
        if self.reducer != "plain" and self.uses_deepspeed:
            raise Refused(
                f"parallel.reducer={self.reducer}, and DeepSpeed reduces gradients itself. Type parallel=ddp or "
                "parallel=fsdp, or parallel.reducer=plain."
            )
        for name in ("zero_stage", "offload", "deepspeed"):
            if (value := getattr(self, name)) and not self.uses_deepspeed:
                raise Refused(
                    f"parallel.{name}={value} is an option of DeepSpeed only. Type parallel=zero1, parallel=zero2 "
                    f"or parallel=zero3 with it, or leave it out."
                )
