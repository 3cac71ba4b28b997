"""This process among the others: its place, its device, and the process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.errors import Refused


@dataclass(frozen=True)
class World:
    """The place of a process, as the launcher gave it in the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> World:
        """The world that torchrun and its kin, or DeepSpeed's launcher, set; one process alone without."""
        if "RANK" not in environment:
            tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
            if "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1:
                raise Refused(
                    f"srun started {tasks} tasks of this command, which would be as many runs that know nothing of "
                    "each other. Start one task a machine: `python -m launch slurm ...` writes such a job, and "
                    "`srun --ntasks-per-node=1 python -m launch torchrun ...` is one. Runs of their own start with "
                    "`env -u SLURM_PROCID` before the command."
                )
            return World()
        local_size = "LOCAL_WORLD_SIZE"
        if local_size not in environment and "LOCAL_SIZE" in environment:
            local_size = "LOCAL_SIZE"  # as DeepSpeed's launcher calls it
        keys: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_size)
        try:
            world = World(*(int(environment[key]) for key in keys))
            if world.size > 1:
                int(environment["MASTER_PORT"]), environment["MASTER_ADDR"]
            return world
        except (KeyError, ValueError):
            keys += ("MASTER_ADDR", "MASTER_PORT")
            given = {key: environment.get(key) for key in keys}
            raise Refused(
                f"The environment places this process only in part: {given}. "
                "Start with `python -m launch local --nproc N -- ...` or torchrun, or unset these variables."
            ) from None


def pick_device(world: World) -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_size > torch.cuda.device_count():
        raise Refused(
            f"{world.local_size} processes on this machine share {torch.cuda.device_count()} GPUs. "
            f"Start {torch.cuda.device_count()} here, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(world: World, device: torch.device, *, alone: bool = False, timeout_s: float = 600) -> Iterator[None]:
    """The processes joined for the time of the context; one alone has nothing to join, unless a group is needed."""
    if world.size == 1 and not alone:
        yield
        return
    if world.size == 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        # gloo beside nccl carries what lies on the CPU, such as a checkpoint's plans.
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(minutes=timeout_s / 60), device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timedelta(minutes=timeout_s / 60))
    try:
        yield
    finally:
        dist.destroy_process_group()
